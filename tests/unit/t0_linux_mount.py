"""The table of mounts, and what is a mount point."""

import errno
import os
from pathlib import Path

import pytest

from devmapper.linux import mount
from devmapper.linux.blockdev import DeviceNumber

_LINES = rb"""36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
22 27 0:21 / /proc rw - proc proc rw
40 27 7:12 / /mnt/a\040b\134c\011\012 rw shared:5 master:2 propagate_from:3 - ext4 /dev/loop12 rw
41 27 0:50 / /mnt/fuse rw - fuse.devmapper devmapper
"""


def test_entries_with_escapes_and_optional_fields() -> None:
    first, second, third, fourth = mount.parse_mountinfo(_LINES)
    assert first == mount.MountEntry(
        36, 35, DeviceNumber(98, 0), "/mnt1", Path("/mnt2"), "rw,noatime", ("master:1",),
        "ext3", "/dev/root", "rw,errors=continue",
    )  # fmt: skip
    assert second.optional == ()
    assert third.mount_point == Path("/mnt/a b\\c\t\n")
    assert third.optional == ("shared:5", "master:2", "propagate_from:3")
    assert str(third.device) == "7:12"
    assert (fourth.fs_type, fourth.super_options) == ("fuse.devmapper", "")


@pytest.mark.parametrize("line", [b"36 35 98:0 / /mnt rw", b"1 2 - ext4 x rw", b"1 2 3 4 5 6 - "])
def test_a_line_that_is_not_understood(line: bytes) -> None:
    with pytest.raises(OSError, match="mountinfo") as caught:
        mount.parse_mountinfo(line)
    assert caught.value.errno == errno.EIO


def test_own_mounts_and_those_of_a_process() -> None:
    assert any(entry.fs_type == "proc" for entry in mount.mountinfo())
    assert mount.mountinfo(os.getpid()) == mount.mountinfo()


def test_what_is_mounted(tmp_path: Path) -> None:
    assert mount.mounted(Path("/proc"))
    assert not mount.mounted(Path("/proc/sys/kernel"))
    assert not mount.mounted(tmp_path)
    assert not mount.mounted(tmp_path / "missing")
    assert not mount.mounted(tmp_path / "missing" / "deeper")
    assert mount.is_mount_point(Path("/proc"))
    assert not mount.is_mount_point(tmp_path)


def test_errors_name_the_object(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="umount") as caught:
        mount.unmount(tmp_path)
    assert caught.value.errno in (errno.EINVAL, errno.EPERM)
    assert caught.value.filename == str(tmp_path)
    with pytest.raises(OSError, match="FIFREEZE") as caught:
        mount.freeze(Path("/proc"))
    assert caught.value.errno in (errno.EOPNOTSUPP, errno.EPERM)
