"""Programs that are run, and processes that are told apart."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from devmapper.errors import EnvironmentLacking, ToolError
from devmapper.linux import process
from devmapper.linux.process import ProcessIdentity


def test_output_and_input_of_a_program() -> None:
    done = process.run(["cat"], input=b"text")
    assert (done.status, done.stdout, done.stderr) == (0, b"text", "")
    assert process.run(["cat"]).stdout == b"", "standard input is not empty"
    assert b"LC_ALL=C\n" in process.run(["env"]).stdout


def test_a_status_that_is_not_wanted_is_an_error() -> None:
    argv = ["sh", "-c", "echo first >&2; echo why >&2; exit 3"]
    assert process.run(argv, ok=(0, 3)).status == 3
    with pytest.raises(ToolError, match="exit status 3: why") as caught:
        process.run(argv)
    assert (caught.value.status, caught.value.stderr) == (3, "first\nwhy\n")
    with pytest.raises(ToolError) as caught:
        process.run(["sh", "-c", "kill -TERM $$"])
    assert caught.value.status == -signal.SIGTERM


def test_a_program_that_takes_too_long_is_killed() -> None:
    with pytest.raises(ToolError, match="longer than"):
        process.run(["sleep", "600"], timeout=0.1)  # more than a test may take


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SEARCH_PATH", "/nonexistent")
    with pytest.raises(EnvironmentLacking, match=r"mkfs\.xfs") as caught:
        process.run(["mkfs.xfs", "/dev/null"])
    assert "xfsprogs" in caught.value.hint


def test_the_search_path_is_not_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert Path(process.find_tool("sh")).is_absolute()


def test_this_process_is_known() -> None:
    me = ProcessIdentity.of(os.getpid())
    assert me.alive()
    assert not me.wait(0.01)


def test_a_process_is_signalled_and_waited_for(tmp_path: Path) -> None:
    log_file = tmp_path / "log"
    child = process.spawn_detached(
        ["sh", "-c", "echo $GREETING; pwd; exec sleep 30"],
        log_file=log_file,
        environment={"GREETING": "hello"},
    )
    try:
        identity = ProcessIdentity.of(child.pid)
        assert os.getsid(child.pid) == child.pid
        assert not identity.wait(0.05)
        assert identity.send_signal(signal.SIGTERM)
        assert identity.wait(60)
        assert not identity.alive(), "a zombie is not alive"
    finally:
        child.kill()
        child.wait()
    assert not identity.send_signal(signal.SIGTERM)
    assert identity.wait(0)
    assert log_file.read_text() == "hello\n/\n"


def test_a_stranger_with_the_same_id_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "30"]) as child:
        try:
            real = ProcessIdentity.of(child.pid)
            former = real._replace(start_time=real.start_time - 1)
            assert not former.alive()
            assert not former.send_signal(signal.SIGKILL)
            assert former.wait(0)
            assert child.poll() is None
        finally:
            child.kill()


def test_a_process_that_is_not_there() -> None:
    with subprocess.Popen(["true"]) as child:
        pass
    with pytest.raises(ProcessLookupError):
        ProcessIdentity.of(child.pid)
