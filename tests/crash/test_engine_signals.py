"""How the engine process ends: SIGTERM, SIGINT, a second signal; SIGHUP is nothing to it."""

import signal
import time
from pathlib import Path

import pytest

from devmapper.engine.embedded import runtime
from devmapper.linux import mount, process
from devmapper.units import MIB, Bytes, ThinId
from tests.support.engine_rig import Rig
from tests.support.leftovers import remaining
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse]

SIZE = Bytes(64 * MIB)
LAYER = ThinId(1)


@pytest.fixture
def target(rig, tmp_path):
    """Where a layer with a file is mounted."""
    pool = rig.activate()
    pool.create_thin(LAYER)
    node = pool.activate("layer", LAYER, SIZE)
    process.run(["mkfs.ext4", "-q", str(node)])
    point = tmp_path / "mnt"
    point.mkdir()
    mount.mount(node, point, "ext4")
    (point / "file").write_text("kept")
    yield point
    while mount.is_mount_point(point):
        mount.unmount(point, flags=mount.UmountFlag.DETACH)


def read_again(rig: Rig, point: Path) -> str:
    mount.mount(rig.activate().activate("layer", LAYER, SIZE), point, "ext4")
    try:
        return (point / "file").read_text()
    finally:
        mount.unmount(point)


def wait_for_log(rig: Rig, words: str) -> None:
    wait_for(lambda: words in rig.paths.log.read_text(), rig.paths.log.read_text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_takes_everything_down(rig, target, runtime_base, number):
    server = rig.server()
    assert server.send_signal(number)
    assert server.wait(30)
    assert remaining(runtime_base) == []
    assert not rig.paths.directory.exists()
    assert not mount.is_mount_point(target)
    rig.check()
    assert read_again(rig, target) == "kept"


def test_a_busy_mount_is_named_and_the_second_signal_forces(rig, target, runtime_base):
    server = rig.server()
    with open(target / "file") as file:
        server.send_signal(signal.SIGTERM)
        wait_for_log(rig, "still serving")
        log = rig.paths.log.read_text()
        assert "layer" in log
        assert str(target) in log
        assert (target / "file").read_text() == "kept"
        assert rig.activate().thin_ids() == [LAYER]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30)
        assert file.closed is False
    assert not mount.is_mount_point(target)
    rig.check()
    assert read_again(rig, target) == "kept"


def test_hangup_is_ignored(rig):
    pool = rig.activate()
    rig.server().send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert pool.thin_ids() == []
    assert rig.server().alive()


def test_the_process_is_its_own(rig):
    rig.activate()
    server = rig.server()
    stat = (f"/proc/{server.pid}/stat", f"/proc/{server.pid}/comm")
    with open(stat[0]) as file:
        fields = file.read().rsplit(") ", 1)[1].split()
    assert fields[1] == "1", "its parent is init"
    assert int(fields[3]) != 0
    with open(stat[1]) as file:
        assert file.read().startswith("devmapper-engin")
    assert runtime.read_pid(rig.paths) == server
