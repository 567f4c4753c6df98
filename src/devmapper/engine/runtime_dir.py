"""What the engines keep below `/run/devmapper`: names, locks, and who may have made the place.

`DEVMAPPER_RUNTIME_DIR` replaces `/run/devmapper`.  Nothing here is durable: after a reboot it is
gone, and it may be.  Locks are the kernel's: it lets go of them when their holder dies.
"""

import errno
import fcntl
import os
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import Final

from devmapper.errors import EngineError, EnvironmentLacking, UsageError

ENVIRONMENT: Final = "DEVMAPPER_RUNTIME_DIR"
SUSPENSION: Final = 1 << 32  # offset of a device's second byte, see `byte_lock`
_DEFAULT_BASE: Final = Path("/run/devmapper")
_NAME_LIMIT: Final = 127  # DM_NAME_LEN less the NUL
_LOCK_POLL_SECONDS: Final = 0.005
_FLOCK: Final = Struct("@hhlli4x")  # struct flock of 64-bit Linux: type whence start len pid


class NoLockFile(Exception):
    """The directory for a lock file is not there."""


def runtime_base() -> Path:
    """Where the runtime directories of all pools are."""
    return Path(os.environ.get(ENVIRONMENT) or _DEFAULT_BASE)


def check_name(name: str, what: str) -> str:
    """A name of a pool or of a device, as device mapper allows it and as a file can have it."""
    if (
        not name
        or name.startswith(".")
        or "/" in name
        or any(ord(char) < 0x20 for char in name)
        or len(os.fsencode(name)) > _NAME_LIMIT
    ):
        raise UsageError(
            f"{what} name {name!r} is not 1 to {_NAME_LIMIT} bytes without '/', control characters"
            " and a dot at its start"
        )
    return name


@contextmanager
def pool_lock(base: Path, pool: str, timeout: float, *, log: Path | None = None) -> Iterator[int]:
    """Only one process at a time activates or deactivates *pool*, whatever the engine.

    Yields the descriptor, which a child may inherit to hold the lock on: that is why leaving closes
    it instead of unlocking.  The file stays, because somebody may wait for it.
    """
    make_private(base)
    path = base / f".lock-{check_name(pool, 'pool')}"
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if time.monotonic() >= deadline:
                    raise EngineError(
                        f"pool {pool!r} has been starting or stopping for more than"
                        f" {timeout:.0f} seconds",
                        hint=f"see {log}" if log else "another process is at it",
                    ) from err
                time.sleep(_LOCK_POLL_SECONDS)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def byte_lock(file: Path, name: str, *, part: int = 0, timeout: float = 60.0) -> Iterator[None]:
    """Hold the lock of device *name*: one process, and one thread of it, at a time.

    A byte of *file* chosen by the name.  Two names that share a byte wait for each other, which is
    harmless.  *part* is where the bytes of another kind of lock begin.  `NoLockFile` if the file's
    directory is not there, `EngineError` if *timeout* seconds were not enough.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(file, flags, 0o600)
    except FileNotFoundError as err:
        raise NoLockFile(str(file)) from err
    try:
        start = part + zlib.crc32(os.fsencode(name))
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
                break
            except OSError as err:
                if err.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() >= deadline:
                    raise EngineError(
                        f"device {name!r} has been held by another command for more than"
                        f" {timeout:.0f} seconds"
                    ) from err
                time.sleep(_LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


def make_private(path: Path) -> None:
    """Make a directory of ours, or accept it; refuse what somebody else may have prepared."""
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError as err:
        raise EnvironmentLacking(
            f"runtime directory {str(path)!r} cannot be made: {err.strerror}",
            hint=f"run as root, or set {ENVIRONMENT} to a directory of your own",
        ) from err
    os.close(open_private(path))


def open_private(path: Path) -> int:
    """Open a directory of ours: no symbolic link, owned by us, and nobody else may write to it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        os.close(fd)
        raise EnvironmentLacking(
            f"runtime directory {str(path)!r} belongs to user {found.st_uid} with mode"
            f" {stat.S_IMODE(found.st_mode):#o}: expected user {os.geteuid()} and no write"
            " permission for others",
            hint=f"remove it, or set {ENVIRONMENT} to a directory of your own",
        )
    return fd
