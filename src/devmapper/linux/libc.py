"""The few functions of the C library that Python's `os` does not have.

One call, one function: every wrapper raises `OSError` with the errno of the call and the name of
the object it was about.  Nothing here knows what the callers are for.
"""

import ctypes
import os
import struct
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
_libc.statx.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_char_p,
]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4

_libc.statx.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_char_p,
]

_STATFS_BUFFER: Final = 512  # struct statfs takes 120 bytes on 64-bit machines
_STATX_BUFFER: Final = 256  # linux/stat.h: struct statx
_STATX_ATTRIBUTES: Final = struct.Struct("=8xQ40xQ")  # stx_attributes, stx_attributes_mask
_STATX_ATTR_MOUNT_ROOT: Final = 0x2000
_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_PR_SET_IO_FLUSHER: Final = 57  # linux/prctl.h
_STATX_MODE: Final = struct.Struct("=28xH")
_STATX_DEVICES: Final = struct.Struct("=128x4I")  # rdev, then dev, each major and minor
_AT_STATX_DONT_SYNC: Final = 0x4000
_AT_NO_AUTOMOUNT: Final = 0x800


def _check(result: int, call: str, subject: str | None) -> None:
    if result == 0:
        return
    errno = ctypes.get_errno()
    message = f"{call}: {os.strerror(errno)}"
    raise OSError(errno, message, subject) if subject else OSError(errno, message)


def mount(source: str, target: str, fs_type: str | None, flags: int, data: str | None) -> None:
    """mount(2)."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if fs_type is None else fs_type.encode("ascii"),
        flags,
        None if data is None else os.fsencode(data),
    )
    _check(result, f"mount {source!r}", target)


def umount2(target: str, flags: int) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), "umount", target)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), with the modes that `os.posix_fallocate` has no way to ask for."""
    _check(_libc.fallocate(fd, mode, offset, length), f"fallocate mode {mode:#x}", None)


def statfs_type(path: str) -> int:
    """`f_type` of statfs(2), which `os.statvfs` leaves out."""
    buffer = ctypes.create_string_buffer(_STATFS_BUFFER)
    _check(_libc.statfs(os.fsencode(path), buffer), "statfs", path)
    (f_type,) = struct.unpack_from("@L", buffer)
    return int(f_type) & 0xFFFFFFFF


def cached_devices(path: str) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Mode, device of the file system, and device that the node stands for, from statx(2).

    With AT_STATX_DONT_SYNC, so that a file system that does not answer any more is not asked.
    """
    buffer = ctypes.create_string_buffer(_STATX_BUFFER)
    flags = _AT_STATX_DONT_SYNC | _AT_NO_AUTOMOUNT
    _check(_libc.statx(_AT_FDCWD, os.fsencode(path), flags, 0, buffer), "statx", path)
    (mode,) = _STATX_MODE.unpack_from(buffer)
    node_major, node_minor, major, minor = _STATX_DEVICES.unpack_from(buffer)
    return mode, (major, minor), (node_major, node_minor)


def is_mount_root(path: str) -> bool | None:
    """Whether *path* itself, no link followed, is the root of a mount, by statx(2).

    None where the kernel cannot tell (before Linux 5.8).
    """
    buffer = ctypes.create_string_buffer(_STATX_BUFFER)
    result = _libc.statx(_AT_FDCWD, os.fsencode(path), _AT_SYMLINK_NOFOLLOW, 0, buffer)
    _check(result, "statx", path)
    attributes, known = _STATX_ATTRIBUTES.unpack_from(buffer)
    if not known & _STATX_ATTR_MOUNT_ROOT:
        return None
    return bool(attributes & _STATX_ATTR_MOUNT_ROOT)


def syncfs(fd: int) -> None:
    """syncfs(2): write out the file system that *fd* is on.

    What could not be written back since *fd* was opened is an error, too (Linux 5.8).
    """
    _check(_libc.syncfs(fd), "syncfs", None)


def set_io_flusher() -> None:
    """Tell memory reclaim that this process serves I/O (PR_SET_IO_FLUSHER, Linux 5.6).

    Without it an allocation of ours can wait for dirty pages that only we can write back.
    """
    _check(_libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0), "prctl(PR_SET_IO_FLUSHER)", None)
