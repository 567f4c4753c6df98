"""A file system that is mounted nowhere: fsopen(2), fsconfig(2), fsmount(2), of Linux 5.2.

Such a mount is reached through its descriptor only.  No path and no namespace has it, so it can
neither leak nor collide, and it ends with the process that holds it, even one that is killed.
glibc has wrappers since 2.36; the calls themselves have the same numbers on every architecture.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_long, c_uint
from errno import EINTR
from pathlib import Path
from typing import Final

from devmapper.linux.blockdev import opened

_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_CLOEXEC: Final = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC, include/uapi/linux/mount.h
_SET_FLAG: Final = 0
_SET_STRING: Final = 1
_CMD_CREATE: Final = 6

_libc: Final = ctypes.CDLL(None, use_errno=True)
_syscall: Final = _libc.syscall
_syscall.restype = c_long


@contextmanager
def mounted_detached(source: Path, fs_type: str, *, flags: Sequence[str] = ()) -> Iterator[int]:
    """The root directory of the file system on *source*, writable, mounted for the duration.

    *flags* are options without a value, such as `nouuid`.  The file system is unmounted, and what
    it has to write is on its device, when the context ends, unless the caller has opened something
    on it that is still open.
    """
    with opened_context(fs_type) as context:
        _configure(context, _SET_STRING, "source", str(source), source)
        for flag in flags:
            _configure(context, _SET_FLAG, flag, None, source)
        _configure(context, _CMD_CREATE, None, None, source)
        mount = _call(_SYS_FSMOUNT, "fsmount", source, c_int(context), c_uint(_CLOEXEC), c_uint(0))
    try:
        # The mount's own descriptor is O_PATH; the directory is what ioctls want
        with opened(Path(f"/proc/self/fd/{mount}/."), os.O_RDONLY | os.O_DIRECTORY) as root:
            yield root
    finally:
        os.close(mount)


@contextmanager
def opened_context(fs_type: str) -> Iterator[int]:
    """A context in which a file system of this kind is set up; ENODEV if the kernel has none."""
    name = c_char_p(fs_type.encode("ascii"))
    fd = _call(_SYS_FSOPEN, f"fsopen {fs_type}", None, name, c_uint(_CLOEXEC))
    try:
        yield fd
    finally:
        os.close(fd)


def _configure(context: int, command: int, key: str | None, value: str | None, path: Path) -> None:
    _call(
        _SYS_FSCONFIG,
        "mount" if key is None else f"mount option {key!r}",
        path,
        c_int(context),
        c_uint(command),
        c_char_p(None if key is None else key.encode("ascii")),
        c_char_p(None if value is None else os.fsencode(value)),
        c_int(0),
    )


def _call(number: int, name: str, path: Path | None, *arguments: c_int | c_uint | c_char_p) -> int:
    while True:
        result = int(_syscall(c_long(number), *arguments))
        if result >= 0:
            return result
        errno = ctypes.get_errno()
        if errno != EINTR:
            message = f"{name}: {os.strerror(errno)}"
            raise OSError(errno, message, None if path is None else str(path))
