"""openat2(2): opening a path that cannot leave a directory.

A thin wrapper of the system call (Linux 5.6); glibc has none.  What to do where a kernel or a
seccomp filter refuses it is for the caller to decide.
"""

import ctypes
import os
from ctypes import c_char_p, c_int, c_long, c_size_t, c_uint64, c_void_p
from errno import EAGAIN, EINTR
from typing import ClassVar, Final

# include/uapi/linux/openat2.h
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_IN_ROOT: Final = 0x10

_SYS_OPENAT2: Final = 437  # the same number on every architecture


class _OpenHow(ctypes.Structure):
    _fields_: ClassVar = [("flags", c_uint64), ("mode", c_uint64), ("resolve", c_uint64)]


_libc: Final = ctypes.CDLL(None, use_errno=True)
_syscall: Final = _libc.syscall
_syscall.argtypes = [c_long, c_int, c_char_p, c_void_p, c_size_t]
_syscall.restype = c_long


def openat2(dir_fd: int, path: str, flags: int, *, resolve: int, mode: int = 0) -> int:
    """Open *path* relative to *dir_fd* under the RESOLVE_ bits *resolve*; returns a descriptor.

    The descriptor is close-on-exec.  Raises `OSError` with *path* as its file name.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    while True:
        fd = _syscall(
            _SYS_OPENAT2, dir_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how)
        )
        if fd >= 0:
            return int(fd)
        errno = ctypes.get_errno()
        # EAGAIN: a rename elsewhere raced with a ".." of the path, openat2(2).
        if errno not in (EAGAIN, EINTR):
            raise OSError(errno, os.strerror(errno), path)
