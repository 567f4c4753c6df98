"""Mounts: mount(2), umount2(2), the table of mounts, freezing, and who keeps a device busy."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag
from fcntl import ioctl
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.linux import libc
from devmapper.linux.blockdev import DeviceNumber, opened

_FIFREEZE: Final = 0xC0045877  # linux/fs.h
_FITHAW: Final = 0xC0045878
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


class MountFlag(IntFlag):
    """The MS_* of linux/mount.h that we pass."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    SYNCHRONOUS = 16
    REMOUNT = 32
    MANDLOCK = 64
    DIRSYNC = 128
    NOATIME = 1024
    NODIRATIME = 2048
    BIND = 4096
    REC = 16384
    PRIVATE = 1 << 18
    RELATIME = 1 << 21
    STRICTATIME = 1 << 24
    LAZYTIME = 1 << 25


class UmountFlag(IntFlag):
    FORCE = 1
    DETACH = 2
    NOFOLLOW = 8


class MountEntry(NamedTuple):
    """One line of mountinfo (proc_pid_mountinfo(5))."""

    mount_id: int
    parent_id: int
    device: DeviceNumber
    root: str
    mount_point: Path
    options: str
    optional: tuple[str, ...]  # shared:N, master:N …
    fs_type: str
    source: str
    super_options: str


def mount(
    source: Path | str, target: Path, fs_type: str | None, *, flags: int = 0, data: str = ""
) -> None:
    """mount(2)."""
    libc.mount(str(source), str(target), fs_type, flags, data or None)


def unmount(target: Path, *, flags: int = 0) -> None:
    """umount2(2); EINVAL if *target* is no mount point, EBUSY if it is in use."""
    libc.umount2(str(target), flags | UmountFlag.NOFOLLOW)


@contextmanager
def mounted_at(
    source: Path | str, target: Path, fs_type: str, *, flags: int = 0, data: str = ""
) -> Iterator[None]:
    """A mount for the duration."""
    mount(source, target, fs_type, flags=flags, data=data)
    try:
        yield
    finally:
        unmount(target)


def mountinfo(pid: int | None = None) -> list[MountEntry]:
    """The mounts that this process sees, or those of the mount namespace of *pid*."""
    path = f"/proc/{'self' if pid is None else pid}/mountinfo"
    with open(path, "rb", buffering=0) as file:
        return parse_mountinfo(file.readall() or b"")


def parse_mountinfo(text: bytes) -> list[MountEntry]:
    """Take a mountinfo file apart, with its octal escapes and its optional fields."""
    return [_parse_entry(line) for line in text.split(b"\n") if line]


def mounted(path: Path) -> bool:
    """Whether *path* is where another file system begins (moby `mount.go` Mounted).

    Compares the device with the parent's: a bind mount of a directory of the same file system does
    not count, `is_mount_point` sees that.  A path that is not there is not mounted.
    """
    try:
        here = path.stat()
    except FileNotFoundError:
        return False
    return here.st_dev != os.stat(path / "..").st_dev


def is_mount_point(path: Path) -> bool:
    """Whether the table of mounts has *path*, bind mounts included; nothing on it is touched."""
    wanted = Path(os.path.realpath(path.parent)) / path.name
    return any(entry.mount_point == wanted for entry in mountinfo())


def is_mount_root(path: Path) -> bool:
    """As `is_mount_point`, without reading the table: asks the file system that is mounted there.

    Not for a FUSE mount whose server may be dead.
    """
    found = libc.is_mount_root(str(path))
    return is_mount_point(path) if found is None else found


def is_mount_of(path: Path, device: DeviceNumber) -> bool:
    """Whether the root of the file system on *device* is mounted on *path*, by asking *path*.

    Not for btrfs, whose files show a device number of their own.  False also where the file system
    does not answer, as an xfs that has shut itself down: the table of mounts knows it all the same.
    """
    try:
        found = path.lstat()
        same = DeviceNumber(os.major(found.st_dev), os.minor(found.st_dev)) == device
        return same and is_mount_root(path)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.EIO):
            return False
        raise


def mounts_of(device: DeviceNumber) -> list[MountEntry]:
    """Where the file system on *device* is mounted, as this process sees it."""
    wanted = str(device).encode("ascii")
    with open("/proc/self/mountinfo", "rb", buffering=0) as file:
        lines = (file.readall() or b"").split(b"\n")
    # A machine may have thousands of mounts, so that only those that are wanted are taken apart
    return [_parse_entry(line) for line in lines if wanted in line.split(b" ", 3)[2:3]]


def make_private(path: Path) -> None:
    """Make *path* a mount point whose mounts do not spread to other namespaces.

    If it is none yet, it is bound onto itself.  Without this every mount below it leaks into each
    container that starts, and keeps devices busy after we have unmounted them.
    """
    if not is_mount_point(path):
        mount(path, path, None, flags=MountFlag.BIND)
    mount("none", path, None, flags=MountFlag.PRIVATE)


def freeze(path: Path) -> None:
    """Freeze the file system mounted at *path*: writes wait, what was written is on its device.

    EBUSY if it is frozen already, EOPNOTSUPP if it cannot.
    """
    _freezing(path, _FIFREEZE, "FIFREEZE")


def thaw(path: Path) -> None:
    """Undo `freeze`; EINVAL if it is not frozen."""
    _freezing(path, _FITHAW, "FITHAW")


@contextmanager
def frozen(path: Path) -> Iterator[None]:
    """Frozen for the duration; thawed on every path."""
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        _freeze_ioctl(fd, _FIFREEZE, "FIFREEZE", path)
        try:
            yield
        finally:
            _freeze_ioctl(fd, _FITHAW, "FITHAW", path)


def _freezing(path: Path, request: int, name: str) -> None:
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        _freeze_ioctl(fd, request, name, path)


def _freeze_ioctl(fd: int, request: int, name: str, path: Path) -> None:
    try:
        ioctl(fd, request, 0)
    except OSError as err:
        raise OSError(err.errno, f"{name}: {err.strerror}", str(path)) from err


def _parse_entry(line: bytes) -> MountEntry:
    head, separator, tail = line.partition(b" - ")
    fields = head.split(b" ")
    rest = tail.split(b" ")
    if not separator or len(fields) < 6 or len(rest) < 2:
        raise OSError(errno.EIO, f"mountinfo has a line {line!r}")
    major, _, minor = fields[2].partition(b":")
    return MountEntry(
        int(fields[0]),
        int(fields[1]),
        DeviceNumber(int(major), int(minor)),
        unescape(fields[3]),
        Path(unescape(fields[4])),
        fields[5].decode("ascii"),
        tuple(field.decode("ascii") for field in fields[6:]),
        unescape(rest[0]),
        unescape(rest[1]),
        unescape(rest[2]) if len(rest) > 2 else "",
    )


def unescape(field: bytes) -> str:
    """A name as /proc spells it, where blanks and the like are octal."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))
