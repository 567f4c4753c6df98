"""The file systems that stand on a device, in every mount namespace, and freezing them.

For client processes only: each of these calls can wait for I/O of the device.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from devmapper.errors import EngineError
from devmapper.linux import mount
from devmapper.linux.blockdev import DeviceNumber, device_number


class MountPoint(NamedTuple):
    """A mount of a device, by a path that this process can use."""

    path: Path  # /proc/<pid>/root/… if it is in the mount namespace of another process
    mount_id: int
    own: bool  # in the mount namespace of this process


def mount_points(device: Path) -> list[MountPoint]:
    """Where *device* is mounted: as this process sees it first, then in other namespaces."""
    number = device_number(device)
    found = _mounts(number, device, Path("/"), mount.mountinfo(), own=True)
    seen = {_namespace("self")}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError):  # the process has ended
            if (namespace := _namespace(name)) in seen:
                continue
            entries = mount.mountinfo(int(name))
            seen.add(namespace)
            found += _mounts(number, device, Path("/proc", name, "root"), entries, own=False)
    return found


@contextmanager
def frozen(points: list[MountPoint]) -> Iterator[None]:
    """Freeze the one file system that is mounted at *points*; thawed on every path.

    All of them are mounts of the same superblock, so one that can be reached is enough.  Nothing
    mounted: nothing to do.
    """
    reached = _open_first(points)
    if reached is None:
        yield
        return
    fd, point = reached
    try:
        # Through the descriptor: the thaw reaches the same file system whatever is unmounted
        with _frozen_at(Path(f"/proc/self/fd/{fd}"), point.path):
            yield
    finally:
        os.close(fd)


def _open_first(points: list[MountPoint]) -> tuple[int, MountPoint] | None:
    for point in points:
        with suppress(FileNotFoundError):  # unmounted meanwhile, or its process has ended
            fd = os.open(point.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _mount_id(fd) == point.mount_id:
                return fd, point
            os.close(fd)  # unmounted meanwhile: this would freeze what lies below
    return None


@contextmanager
def _frozen_at(path: Path, name: Path) -> Iterator[None]:
    try:
        mount.freeze(path)
    except OSError as err:
        if err.errno == errno.EBUSY:
            raise EngineError(
                f"file system at {str(name)!r} is frozen by somebody else",
                hint=f"thaw it: fsfreeze --unfreeze {name}",
            ) from err
        raise OSError(err.errno, err.strerror, str(name)) from err
    try:
        yield
    finally:
        mount.thaw(path)


def _mounts(
    number: DeviceNumber, device: Path, root: Path, entries: list[mount.MountEntry], *, own: bool
) -> list[MountPoint]:
    # btrfs has anonymous device numbers, so there the source decides
    return [
        MountPoint(root / entry.mount_point.relative_to("/"), entry.mount_id, own)
        for entry in entries
        if entry.device == number or (entry.device.major == 0 and entry.source == str(device))
    ]


def _namespace(pid: str) -> str:
    return str(Path("/proc", pid, "ns/mnt").readlink())


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "mnt_id":
                return int(value)
    raise OSError(errno.EIO, "fdinfo has no mnt_id")
