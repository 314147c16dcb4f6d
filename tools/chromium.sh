#!/bin/sh
# The browser tests need Debian's Chromium and a font with Hangul: installed where that is allowed, else asked for.
set -eu
command -v chromium >/dev/null 2>&1 && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "storyweft: installing chromium and fonts-nanum for the browser tests"
    log=$(mktemp)
    { apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-nanum; } >"$log" 2>&1 && exit 0
    echo "storyweft: installing chromium failed: $(tail -n 1 "$log")" >&2
    exit 1
fi
echo "storyweft: the browser tests need Chromium; install it (Debian: sudo apt-get install chromium fonts-nanum) and run again." >&2
exit 1
