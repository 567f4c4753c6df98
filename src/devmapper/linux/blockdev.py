"""Block devices and what stands on them: size, discard, flush, kind of file system."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from devmapper.units import Bytes

_BLKGETSIZE64: Final = 0x80081272  # linux/fs.h
_BLKROGET: Final = 0x125E
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_U64: Final = Struct("=Q")
_RANGE: Final = Struct("=QQ")
_INT: Final = Struct("@i")

_PROBE_LENGTH: Final = 0x10048  # what Docker's ProbeFsType reads; less is an error


class _Magic(NamedTuple):
    name: str
    offset: int
    magic: bytes


# Docker's order; ext2 and ext3 have ext4's magic and are reported as ext4.
_MAGICS: Final = (
    _Magic("btrfs", 0x10040, b"_BHRfS_M"),
    _Magic("ext4", 0x438, b"\x53\xef"),
    _Magic("xfs", 0, b"XFSB"),
)


class DeviceNumber(NamedTuple):
    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """An open descriptor (always close-on-exec), closed on every path."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def is_block_device(path: Path) -> bool:
    """Whether *path* is there and is a block device; symbolic links are followed."""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except FileNotFoundError:
        return False


def device_number(path: Path) -> DeviceNumber:
    """Major and minor number; ENOTBLK if *path* is no block device."""
    found = path.stat()
    if not stat.S_ISBLK(found.st_mode):
        raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), str(path))
    return DeviceNumber(os.major(found.st_rdev), os.minor(found.st_rdev))


def size(path: Path) -> Bytes:
    """Size of a block device or of a regular file."""
    with opened(path, os.O_RDONLY) as fd:
        return size_of(fd, path)


def size_of(fd: int, path: Path) -> Bytes:
    """Size of what is open as *fd*; *path* is for the error only."""
    found = os.fstat(fd)
    if not stat.S_ISBLK(found.st_mode):
        return Bytes(found.st_size)
    raw = _ioctl(fd, _BLKGETSIZE64, bytes(8), "BLKGETSIZE64", path)
    (value,) = _U64.unpack(raw)
    return Bytes(value)


def is_read_only(path: Path) -> bool:
    """Whether the kernel refuses writes to a block device, whoever opens it."""
    with opened(path, os.O_RDONLY) as fd:
        (value,) = _INT.unpack(_ioctl(fd, _BLKROGET, bytes(_INT.size), "BLKROGET", path))
    return bool(value)


def discard(path: Path, offset: int = 0, length: int | None = None) -> None:
    """BLKDISCARD a range, by default the whole device.

    EOPNOTSUPP where the device cannot.  The pages that the kernel has of the range are dropped.
    """
    with opened(path, os.O_WRONLY) as fd:
        end = size_of(fd, path) if length is None else offset + length
        discard_range(fd, path, offset, end - offset)


def discard_range(fd: int, path: Path, offset: int, length: int) -> None:
    """BLKDISCARD a range of what is open as *fd*; *path* is for the error only."""
    _ioctl(fd, _BLKDISCARD, _RANGE.pack(offset, length), "BLKDISCARD", path)


def zero_range(fd: int, path: Path, offset: int, length: int) -> None:
    """BLKZEROOUT a range of what is open as *fd*; *path* is for the error only."""
    _ioctl(fd, _BLKZEROOUT, _RANGE.pack(offset, length), "BLKZEROOUT", path)


def flush(path: Path) -> None:
    """Write back what the kernel holds of the device and flush its write cache (fsync)."""
    with opened(path, os.O_RDONLY) as fd:
        try:
            os.fsync(fd)
        except OSError as err:
            raise OSError(err.errno, f"fsync: {err.strerror}", str(path)) from err


def probe_fs_type(path: Path) -> str:
    """Kind of the file system on a device or in a file: btrfs, ext4 or xfs.

    EIO if the device is shorter than what has to be read, EINVAL if none of them is there
    (moby `devmapper/mount.go` ProbeFsType).
    """
    with open(path, "rb", buffering=0) as file:
        head = bytearray()
        while len(head) < _PROBE_LENGTH:
            piece = file.read(_PROBE_LENGTH - len(head))
            if not piece:
                message = f"short read: {len(head)} bytes of {_PROBE_LENGTH}"
                raise OSError(errno.EIO, message, str(path))
            head += piece
    for candidate in _MAGICS:
        if head.startswith(candidate.magic, candidate.offset):
            return candidate.name
    raise OSError(errno.EINVAL, "unknown kind of file system", str(path))


def _ioctl(fd: int, request: int, argument: bytes, name: str, path: Path) -> bytes:
    try:
        return ioctl(fd, request, argument)
    except OSError as err:
        raise OSError(err.errno, f"{name}: {err.strerror}", str(path)) from err
