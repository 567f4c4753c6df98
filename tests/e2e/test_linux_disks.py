"""What is on a disk and who has it: loop devices stand for disks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.deviceset import pool_devices
from devmapper.deviceset.pool_devices import Named
from devmapper.errors import DeviceBusy, EnvironmentLacking, UsageError
from devmapper.linux import blockdev, disks, loop, mount, process
from devmapper.units import MIB

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 32 * MIB)
    return path


@pytest.fixture
def disk(file: Path) -> Iterator[Path]:
    with loop.attached(file) as node:
        yield node


def named(*paths: Path) -> list[Named]:
    return [
        Named(name, path)
        for name, path in zip(("dm.datadev", "dm.metadatadev"), paths, strict=False)
    ]


def test_signatures(disk):
    assert disks.signatures(disk) == []
    process.run(["mkfs.ext4", "-q", str(disk)])
    assert [str(each) for each in disks.signatures(disk)] == ["ext4 (at byte 1080)"]
    process.run(["wipefs", "-q", "--all", str(disk)])
    assert disks.signatures(disk) == []
    process.run(["sfdisk", "-q", str(disk)], input=b"label: gpt\n,10M\n", ok=(0, 1))
    assert "gpt" in [each.kind for each in disks.signatures(disk)]


def test_a_mounted_disk_is_in_use_and_so_is_its_file(disk, file, tmp_path):
    assert disks.users(disk) == disks.users(file) == []
    process.run(["mkfs.ext4", "-q", str(disk)])
    point = tmp_path / "mnt"
    point.mkdir()
    mount.mount(disk, point, "ext4")
    try:
        assert disks.users(disk) == [f"mounted at {str(point)!r}"]
        assert disks.users(file) == [f"loop device {str(disk)!r}"]
        for path in (disk, file):
            with pytest.raises(DeviceBusy):
                pool_devices.check_devices(named(path))
    finally:
        mount.unmount(point)


def test_a_device_and_its_other_names_overlap(disk, file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(disk)
    node = tmp_path / "node"
    number = blockdev.device_number(disk)
    os.mknod(node, 0o60600, os.makedev(*number))
    other = tmp_path / "other"
    other.touch()
    os.truncate(other, MIB)
    for same in (link, node, file):
        assert disks.overlaps(disk, same)
        assert disks.overlaps(same, disk)
        with pytest.raises(UsageError, match="share"):
            pool_devices.check_devices(named(disk, same))
    assert not disks.overlaps(disk, other)
    with loop.attached(other) as second:
        assert not disks.overlaps(disk, second)
        pool_devices.check_devices(named(disk, second))


def test_a_read_only_device(file):
    with loop.attached(file, read_only=True) as node:
        assert blockdev.is_read_only(node)
        with pytest.raises(EnvironmentLacking, match="read"):
            pool_devices.check_devices(named(node))


def test_no_device_of_device_mapper_has_an_unknown_name():
    assert disks.dm_uuid("no-such-device-of-ours") is None
