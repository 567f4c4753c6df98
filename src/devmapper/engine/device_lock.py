"""The lock on a metadata device that keeps a second engine from opening the same pool.

The kernel takes no lock for a pool of its own; for that there is `claims`.

An open-file-description lock on the device itself (fcntl(2)), which the kernel drops when the
holder dies.  Nothing can be written into the device to name the holder, so the length of the locked
range is its process id: whoever is refused is told that range.
"""

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import F_OFD_GETLK, F_OFD_SETLK, F_RDLCK, F_UNLCK, F_WRLCK, fcntl
from pathlib import Path
from struct import Struct
from typing import Final

from devmapper.errors import PoolBusy
from devmapper.linux import blockdev

_FLOCK: Final = Struct("@hhlli4x")  # struct flock of 64-bit Linux: type whence start len pid


@contextmanager
def device_lock(path: Path, *, read_only: bool = False) -> Iterator[None]:
    """Hold the lock on the pool whose metadata are at *path*; `PoolBusy` if somebody else does.

    Those who only read exclude writers, not each other.
    """
    with blockdev.opened(path, os.O_RDONLY if read_only else os.O_RDWR) as fd:
        kind = F_RDLCK if read_only else F_WRLCK
        request = _FLOCK.pack(kind, os.SEEK_SET, 0, os.getpid(), 0)
        try:
            fcntl(fd, F_OFD_SETLK, request)
        except OSError as err:
            if err.errno not in (errno.EAGAIN, errno.EACCES):
                raise OSError(err.errno, f"lock: {err.strerror}", str(path)) from err
            raise PoolBusy(path, _holder(fd, request)) from err
        try:
            yield
        finally:
            # A child that was forked meanwhile shares the description: closing is not enough
            fcntl(fd, F_OFD_SETLK, _FLOCK.pack(F_UNLCK, os.SEEK_SET, 0, 0, 0))


def _holder(fd: int, request: bytes) -> str:
    kind, _, _, process, _ = _FLOCK.unpack(fcntl(fd, F_OFD_GETLK, request))
    if kind == F_UNLCK:
        return "a process that has just let go of it"
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return f"process {process}"
    return f"process {process} ({shlex.join(os.fsdecode(word) for word in words)})"
