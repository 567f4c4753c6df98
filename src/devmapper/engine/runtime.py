"""What the engines share of /run/devmapper: names, directories of ours, locks.

    /run/devmapper/<pool>/         0700, ours; what is in it is the engine's affair
    /run/devmapper/.lock-<pool>    held by whoever starts or stops the pool

`DEVMAPPER_RUNTIME_DIR` replaces `/run/devmapper`.  Nothing here is durable: after a reboot it is
gone, and it may be.  The directory is removed with the pool; the lock beside it is not, because
somebody may wait for it.
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
_DEFAULT_BASE: Final = Path("/run/devmapper")
_NAME_LIMIT: Final = 127  # DM_NAME_LEN less the NUL
_LOCK_POLL_SECONDS: Final = 0.005
_FLOCK: Final = Struct("@hhlli4x")  # struct flock of 64-bit Linux: type whence start len pid
SUSPENSION: Final = 1 << 32  # offset of a device's second byte in the file of locks


class DeviceLocked(EngineError):
    """Another command works on the device and did not end in time."""


def runtime_base() -> Path:
    """Where the runtime directories of all pools are."""
    return Path(os.environ.get(ENVIRONMENT) or _DEFAULT_BASE)


def directory_of(pool: str) -> Path:
    """The directory of *pool*; nothing is made or looked at.

    The base is resolved, because sysfs names the backing files of loop devices that way.
    """
    return Path(os.path.realpath(runtime_base())) / check_name(pool, "pool")


def start_lock_of(directory: Path) -> Path:
    """The file that `start_lock` locks."""
    return directory.parent / f".lock-{directory.name}"


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
def start_lock(directory: Path, timeout: float, *, log: Path | None = None) -> Iterator[int]:
    """Only one process at a time starts or stops a pool.

    Yields the descriptor: the embedded engine's process inherits it while it starts, so that the
    lock is held even if its starter dies.  That is why leaving closes the descriptor instead of
    unlocking it.
    """
    fd = _open_lock(start_lock_of(directory))
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if time.monotonic() >= deadline:
                    raise EngineError(
                        f"the engine of pool {directory.name!r} has been starting or stopping"
                        f" for more than {timeout:.0f} seconds",
                        hint=f"see {log}" if log else "",
                    ) from err
                time.sleep(_LOCK_POLL_SECONDS)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def device_lock(file: Path, name: str, *, part: int = 0, timeout: float = 60.0) -> Iterator[None]:
    """Only one process, and one thread of it, at a time changes what a device is.

    A byte of *file*, which has to exist, chosen by the name; the kernel lets go of it when its
    holder dies.  Two names that share a byte wait for each other, which is harmless.  *part*
    SUSPENSION is a lock of its own, so that a suspended device can still be asked to deactivate
    (and refuse).  `DeviceLocked` after *timeout* seconds.
    """
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
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
                    raise DeviceLocked(
                        f"device {name!r} has been held by another command for more than"
                        f" {timeout:.0f} seconds"
                    ) from err
                time.sleep(_LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


def make_private(path: Path) -> None:
    """Make a directory of ours; refuse what somebody else may have prepared."""
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


def _open_lock(file: Path) -> int:
    make_private(file.parent)
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
