"""A real ComfyUI server with this pack linked in: `serve` for the page, a context manager for the demo and the tests."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from environment import ROOT, Trouble, comfyui, one_sentence, python, say  # noqa: E402


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Trouble(
                f"port {port} is busy ({error.strerror}); stop what uses it or set PORT to another number."
            ) from error


def prepare(base: Path) -> None:
    """Folders of a ComfyUI base directory, with the pack linked into custom_nodes."""
    for name in ("custom_nodes", "input", "output", "models", "user", "temp"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "storyweft"
    if link.is_symlink() and link.resolve() != ROOT:  # the repository was moved or copied together with output/
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(ROOT)


def wait(process: subprocess.Popen, port: int, log: Path) -> None:
    """Until the server answers; Trouble with the end of its log when it has died or says nothing for five minutes."""
    for _ in range(600):
        if process.poll() is not None:
            tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise Trouble(f"ComfyUI stopped while starting: {' '.join(tail) or 'no message'} (log: {log}).")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise Trouble(f"ComfyUI did not answer on port {port} for five minutes (log: {log}).")


def end_with_parent() -> None:
    """In the new process: Linux ends it when the one that started it is gone, even if that was killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def running(port: int, base: Path, extra: tuple[str, ...] = ()):
    """A server on `port` with its files under `base`; yields (url, process) and stops it at the end."""
    check_port(port)
    prepare(base)
    log = base / "server.log"
    command = [
        str(python()),
        "main.py",
        "--cpu",
        "--port",
        str(port),
        "--base-directory",
        str(base),
        "--database-url",
        "sqlite:///:memory:",
        "--disable-api-nodes",
        "--preview-method",
        "latent2rgb",
        *extra,
    ]
    if os.environ.get("STORYWEFT_DEVICE") == "gpu":
        command.remove("--cpu")
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=comfyui(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent
        )
    try:
        wait(process, port, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def request(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60
    ) as answer:
        return json.load(answer)


def serve() -> None:
    port = int(os.environ.get("PORT", "8188"))
    base = ROOT / "output" / "comfyui"
    say(f"starting ComfyUI on port {port}; files under {base}")
    with running(port, base) as (url, process):
        say(
            f"open {url} in a browser; the workflows are under Workflow > Browse Templates > storyweft; stop with Ctrl-C"
        )
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()


if __name__ == "__main__":
    with one_sentence():
        serve()
