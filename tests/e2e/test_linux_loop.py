"""Loop devices of the real kernel."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.engine.embedded import attachment
from devmapper.linux import blockdev, files, loop
from devmapper.linux.loop import Detached
from devmapper.units import Bytes

pytestmark = [pytest.mark.root, pytest.mark.fuse]

MIB = 1024 * 1024


@pytest.fixture
def backing(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "backing file"
    files.make_sparse(path, Bytes(8 * MIB))
    yield path
    for device in loop.find_by_backing_file(path):
        loop.detach(device, deferred=True)


def test_attached_device_says_what_it_is(backing: Path) -> None:
    device = loop.attach(backing)
    status = loop.status(device)
    assert status.backs(backing.stat())
    assert status.backing_file == backing
    assert not status.read_only
    assert not status.autoclear
    assert blockdev.is_block_device(device)
    assert blockdev.size(device) == loop.capacity(device) == 8 * MIB
    assert blockdev.device_number(device).major == loop.LOOP_MAJOR
    assert loop.detach(device) is Detached.GONE
    assert loop.find_status(device) is None or not loop.status(device).backs(backing.stat())


def test_a_device_is_found_by_the_file_whatever_its_name(backing: Path) -> None:
    other = backing.with_name("hard link")
    other.hardlink_to(backing)
    with loop.attached(other) as device:
        (found,) = loop.find_by_inode(backing.stat())
        assert found.path == device
        assert loop.find_by_inode(backing.parent.stat()) == []
    assert loop.find_by_inode(backing.stat()) == []


def test_detaching_twice(backing: Path) -> None:
    device = loop.attach(backing)
    assert loop.detach(device) is Detached.GONE
    if loop.find_status(device) is None:
        assert loop.detach(device) is Detached.ALREADY


def test_a_read_only_device_refuses_writes(backing: Path) -> None:
    device = loop.attach(backing, read_only=True)
    assert loop.status(device).read_only
    with pytest.raises(PermissionError), blockdev.opened(device, os.O_WRONLY) as fd:
        os.write(fd, bytes(512))
    loop.detach(device)


def test_a_device_in_use_stays_as_it_was(backing: Path) -> None:
    with loop.attached(backing) as device, blockdev.opened(device, os.O_RDWR) as fd:
        with pytest.raises(OSError, match="in use") as caught:
            loop.detach(device)
        assert caught.value.errno == errno.EBUSY
        assert not loop.status(device).autoclear
        assert os.pwrite(fd, b"x" * 512, 0) == 512


def test_deferred_detach_happens_on_the_last_close(backing: Path) -> None:
    device = loop.attach(backing)
    with blockdev.opened(device, os.O_RDONLY):
        assert loop.detach(device, deferred=True) is Detached.DEFERRED
        assert loop.status(device).autoclear
    assert loop.find_by_backing_file(backing) == []


def test_deferred_detach_is_cancelled(backing: Path) -> None:
    device = loop.attach(backing)
    with blockdev.opened(device, os.O_RDONLY):
        loop.detach(device, deferred=True)
        assert loop.cancel_autoclear(device)
        assert not loop.cancel_autoclear(device)
    assert loop.find_by_backing_file(backing) == [device]
    assert loop.detach(device) is Detached.GONE


def test_waiting_for_the_last_user(backing: Path) -> None:
    device = loop.attach(backing)
    fd = os.open(device, os.O_RDONLY)
    timer = threading.Timer(0.2, os.close, [fd])
    timer.start()
    assert loop.detach(device, timeout=60) is Detached.GONE
    timer.join()


def test_all_devices_of_a_file_are_found_even_when_it_is_deleted(backing: Path) -> None:
    devices = sorted([loop.attach(backing), loop.attach(backing)], key=lambda path: len(str(path)))
    try:
        assert set(loop.find_by_backing_file(backing)) == set(devices)
        backing.unlink()
        assert set(loop.find_by_backing_file(backing)) == set(devices)
    finally:
        for device in devices:
            loop.detach(device)


def test_capacity_follows_the_file(backing: Path) -> None:
    with loop.attached(backing) as device:
        os.truncate(backing, 16 * MIB)
        assert blockdev.size(device) == 8 * MIB
        loop.set_capacity(device)
        assert blockdev.size(device) == 16 * MIB


def test_an_exclusive_user_is_seen(backing: Path) -> None:
    with loop.attached(backing) as device:
        assert not loop.is_open_exclusively(device)
        with blockdev.opened(device, os.O_RDONLY):
            assert not loop.is_open_exclusively(device)
        with blockdev.opened(device, os.O_RDONLY | os.O_EXCL):
            assert loop.is_open_exclusively(device)


def test_discarding_makes_holes(backing: Path) -> None:
    with loop.attached(backing) as device:
        with blockdev.opened(device, os.O_RDWR) as fd:
            os.pwrite(fd, b"x" * MIB, 0)
        blockdev.flush(device)
        assert files.allocated_bytes(backing) >= MIB
        blockdev.discard(device)
        assert files.allocated_bytes(backing) < 64 * 1024
        with open(device, "rb") as file:
            assert file.read(MIB) == bytes(MIB)


def test_threads_that_attach_at_once_get_different_devices(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(12)]
    for path in paths:
        files.make_sparse(path, Bytes(MIB))
    found: dict[Path, Path] = {}
    threads = [
        threading.Thread(target=lambda path=path: found.update({path: loop.attach(path)}))
        for path in paths
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found.values())) == len(paths)
        for path, device in found.items():
            assert loop.status(device).backs(path.stat())
    finally:
        for device in found.values():
            loop.detach(device, timeout=60)


def test_a_missing_file_and_a_device_without_file(tmp_path: Path, backing: Path) -> None:
    with pytest.raises(FileNotFoundError):
        loop.attach(tmp_path / "missing")
    with loop.attached(backing) as device:
        pass
    if loop.find_status(device) is None:
        with pytest.raises(OSError, match="LOOP_GET_STATUS64") as caught:
            loop.status(device)
        assert caught.value.errno == errno.ENXIO


def test_a_device_whose_attachment_was_killed_gets_its_size(backing: Path) -> None:
    """As SIGKILL amid LOOP_CONFIGURE leaves it: attached, and empty."""
    os.truncate(backing, 0)
    device = loop.attach(backing)
    os.truncate(backing, 8 * MIB)
    assert loop.capacity(device) == 0
    assert attachment.attach(backing) == device
    assert loop.capacity(device) == 8 * MIB
    loop.detach(device)
