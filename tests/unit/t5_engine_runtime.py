"""Runtime directories, the table of activation states, the choice of an engine, sparse copies."""

import os
import sys
import threading
from pathlib import Path

import pytest

from devmapper.engine import select
from devmapper.engine.activation import TRANSITIONS, Event, next_state
from devmapper.engine.embedded import requirements, runtime
from devmapper.engine.port import Activation
from devmapper.errors import EngineError, EnvironmentLacking, ThinBusy, UsageError
from devmapper.linux import process


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setenv(runtime.ENVIRONMENT, str(tmp_path / "base"))
    found = runtime.paths_of("pool")
    runtime.make_directories(found)
    return found


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\0b", "a\nb", "x" * 128])
def test_names_that_no_device_can_have(name):
    with pytest.raises(UsageError):
        runtime.paths_of(name)


def test_docker_names_are_fine():
    name = "docker-8:1-1234567-" + "0123456789abcdef" * 4 + "-init"
    assert runtime.check_name(name, "device") == name


def test_the_directory_is_private(paths):
    assert paths.directory.stat().st_mode & 0o777 == 0o700
    assert paths.directory.parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_can_write_is_refused(paths):
    paths.directory.chmod(0o770)
    with pytest.raises(EnvironmentLacking, match="belongs to user"):
        runtime.make_directories(paths)


def test_a_symbolic_link_is_refused(paths, tmp_path):
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    link = runtime.paths_of("link")
    link.directory.symlink_to(other)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        runtime.make_directories(link)


@pytest.mark.parametrize("depth", [1, 40])
def test_a_socket_however_deep_its_directory(tmp_path, monkeypatch, depth):
    base = tmp_path.joinpath(*["deeper"] * depth)
    monkeypatch.setenv(runtime.ENVIRONMENT, str(base))
    paths = runtime.paths_of("pool")
    runtime.make_directories(paths)
    with pytest.raises(FileNotFoundError):
        runtime.connect(paths, 1.0)
    with runtime.listen(paths) as listener:
        assert paths.socket.stat().st_mode & 0o777 == 0o600
        with runtime.connect(paths, 1.0) as connection:
            accepted, _ = listener.accept()
            accepted.close()
            assert connection.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        runtime.connect(paths, 1.0)


def test_a_pid_is_known_with_its_start_time(paths):
    assert runtime.read_pid(paths) is None
    runtime.write_pid(paths)
    identity = runtime.read_pid(paths)
    assert identity == process.ProcessIdentity.of(os.getpid())
    paths.pid.write_text(f"{os.getpid()} 1\n")
    recycled = runtime.read_pid(paths)
    assert recycled is not None
    assert not recycled.alive()
    paths.pid.write_text("garbage")
    assert runtime.read_pid(paths) is None


def test_only_one_starts(paths):
    with (
        runtime.start_lock(paths, 1.0),
        pytest.raises(EngineError, match="starting or stopping"),
        runtime.start_lock(paths, 0),
    ):
        pytest.fail("two starters")
    with runtime.start_lock(paths, 0):
        pass


def test_the_start_lock_outlives_its_starter(paths):
    with runtime.start_lock(paths, 0) as fd:
        inherited = os.dup(fd)
    try:
        with pytest.raises(EngineError), runtime.start_lock(paths, 0):
            pytest.fail("the engine process has it")
    finally:
        os.close(inherited)
    with runtime.start_lock(paths, 0):
        pass


def test_device_locks_are_one_for_each_device_and_part(paths):
    with runtime.device_lock(paths, "a"):
        with runtime.device_lock(paths, "b", timeout=0):
            pass
        with runtime.device_lock(paths, "a", part=runtime.SUSPENSION, timeout=0):
            pass
        with pytest.raises(EngineError), runtime.device_lock(paths, "a", timeout=0):
            pytest.fail("two at a time")


def test_a_device_lock_is_waited_for(paths):
    order = []
    inside = threading.Event()

    def first():
        with runtime.device_lock(paths, "a"):
            inside.set()
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with runtime.device_lock(paths, "a"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_removing_the_directory_leaves_only_the_lock(paths):
    with runtime.start_lock(paths, 0):
        runtime.remove_directory(paths)
        runtime.remove_directory(paths)
    assert os.listdir(paths.directory.parent) == [".lock-pool"]


def test_every_state_and_event_has_an_answer():
    for state in Activation:
        for event in Event:
            if event in TRANSITIONS[state]:
                assert next_state("d", state, event) is TRANSITIONS[state][event]
            else:
                with pytest.raises(ThinBusy, match="'d' is busy"):
                    next_state("d", state, event)
    reachable = {after for steps in TRANSITIONS.values() for after in steps.values()}
    assert reachable == set(Activation)


def test_the_kernel_engine_is_refused_in_one_sentence():
    with pytest.raises(EnvironmentLacking, match="kernel engine") as error:
        select.choose_engine("kernel")
    assert "\n" not in str(error.value)
    assert error.value.hint


def test_a_machine_without_root_is_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for preference in ("auto", "embedded"):
        with pytest.raises(EnvironmentLacking, match="root") as error:
            select.choose_engine(preference)
        assert error.value.hint


def test_a_machine_without_fuse_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    missing = str(tmp_path / "fuse")
    monkeypatch.setattr(requirements, "_NODES", {missing: "get one"})
    with pytest.raises(EnvironmentLacking, match="No such file") as error:
        requirements.check()
    assert missing in str(error.value)
    assert error.value.hint == "get one"


def test_the_client_imports_nothing_heavy():
    program = (
        "import sys, devmapper.engine.embedded.client as c; import devmapper.engine.select;"
        "print(*sorted(sys.modules))"
    )
    done = process.run([sys.executable, "-c", program], input=b"")
    loaded = set(done.stdout.decode().split())
    heavy = {"subprocess", "logging", "ctypes", "rich", "typer", "shutil", "tempfile", "asyncio"}
    assert loaded & heavy == set()
    assert not {name for name in loaded if name.startswith("devmapper.thin.")}


def test_runtime_base_is_taken_from_the_environment(monkeypatch):
    monkeypatch.delenv(runtime.ENVIRONMENT, raising=False)
    assert runtime.runtime_base() == Path("/run/devmapper")
    monkeypatch.setenv(runtime.ENVIRONMENT, "/somewhere")
    assert runtime.paths_of("p").directory == Path("/somewhere/p")
