"""The runtime directory of one pool: where its engine process and its clients meet.

    /run/devmapper/<pool>/            0700, ours
        control.sock                  requests, see `protocol`
        export/                       FUSE mount with one file for each active thin device
        engine.pid                    process id and start time
        engine.log
        devices.lock                  one byte of it for each device, see `device_lock`
    /run/devmapper/.lock-<pool>       held by whoever starts or stops an engine process

`DEVMAPPER_RUNTIME_DIR` replaces `/run/devmapper`.  Nothing here is durable: after a reboot it is
gone, and it may be.  The directory is removed with the engine process; the lock beside it is not,
because somebody may wait for it.
"""

import errno
import fcntl
import os
import socket
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from devmapper.errors import EngineError, EnvironmentLacking, UsageError

if TYPE_CHECKING:
    from devmapper.linux.process import ProcessIdentity

ENVIRONMENT: Final = "DEVMAPPER_RUNTIME_DIR"
_DEFAULT_BASE: Final = Path("/run/devmapper")
_NAME_LIMIT: Final = 127  # DM_NAME_LEN less the NUL
_LOCK_POLL_SECONDS: Final = 0.005
_FLOCK: Final = Struct("@hhlli4x")  # struct flock of 64-bit Linux: type whence start len pid
SUSPENSION: Final = 1 << 32  # offset of a device's second byte in devices.lock


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


class Paths(NamedTuple):
    """The files of one pool's runtime directory."""

    directory: Path

    @property
    def socket(self) -> Path:
        return self.directory / "control.sock"

    @property
    def export(self) -> Path:
        return self.directory / "export"

    @property
    def pid(self) -> Path:
        return self.directory / "engine.pid"

    @property
    def log(self) -> Path:
        return self.directory / "engine.log"

    @property
    def device_locks(self) -> Path:
        return self.directory / "devices.lock"

    @property
    def start_lock(self) -> Path:
        return self.directory.parent / f".lock-{self.directory.name}"

    def exported(self, name: str) -> Path:
        """The file that stands for the device *name*."""
        return self.export / name


def paths_of(pool: str) -> Paths:
    """The paths for *pool*; nothing is made or looked at.

    The base is resolved, because sysfs names the backing files of loop devices that way.
    """
    return Paths(Path(os.path.realpath(runtime_base())) / check_name(pool, "pool"))


def make_directories(paths: Paths) -> None:
    """Make the runtime directory and its base; refuse what somebody else may have prepared."""
    _make_private(paths.directory.parent)
    _make_private(paths.directory)
    # Not looked at: a stale FUSE mount on it answers nothing but ENOTCONN
    with suppress(FileExistsError):
        paths.export.mkdir(mode=0o700)


def remove_directory(paths: Paths) -> None:
    """Remove the runtime directory; the export has to be unmounted before.

    It disappears at once: a starter finds all of it, with the process id in it, or nothing.
    """
    import glob
    import shutil

    base, name = paths.directory.parent, paths.directory.name
    with suppress(FileNotFoundError):
        paths.directory.rename(base / f".gone-{name}-{os.getpid()}")
    for doomed in base.glob(f".gone-{glob.escape(name)}-*"):  # ours, and what others did not finish
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def start_lock(paths: Paths, timeout: float) -> Iterator[int]:
    """Only one process at a time starts or stops the engine of a pool.

    Yields the descriptor: the engine process inherits it while it starts, so that the lock is held
    even if its starter dies.  That is why leaving closes the descriptor instead of unlocking it.
    """
    _make_private(paths.directory.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(paths.start_lock, flags, 0o600)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if time.monotonic() >= deadline:
                    raise EngineError(
                        f"the engine of pool {paths.directory.name!r} has been starting or"
                        f" stopping for more than {timeout:.0f} seconds",
                        hint=f"see {paths.log}",
                    ) from err
                time.sleep(_LOCK_POLL_SECONDS)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def device_lock(paths: Paths, name: str, *, part: int = 0, timeout: float = 60.0) -> Iterator[None]:
    """Only one process, and one thread of it, at a time changes what stands on a device's file.

    A byte of `devices.lock` chosen by the name; the kernel lets go of it when its holder dies.
    Two names that share a byte wait for each other, which is harmless.  *part* SUSPENSION is a lock
    of its own, so that a suspended device can still be asked to deactivate (and refuse).
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(paths.device_locks, flags, 0o600)
    except FileNotFoundError as err:
        raise EngineError(f"pool {paths.directory.name!r} has no engine process") from err
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


def connect(paths: Paths, timeout: float) -> socket.socket:
    """A connection to the engine process; `FileNotFoundError`, `ConnectionRefusedError` if none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        with _short_name(paths) as name:
            connection.connect(name)
    except BaseException:
        connection.close()
        raise
    return connection


def listen(paths: Paths) -> socket.socket:
    """The socket of the engine process, for its user only."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_name(paths) as name:
            paths.socket.unlink(missing_ok=True)
            listener.bind(name)
        paths.socket.chmod(0o600)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def write_pid(paths: Paths) -> None:
    """Say who the engine process is: this one."""
    from devmapper.linux.process import ProcessIdentity

    identity = ProcessIdentity.of(os.getpid())
    temporary = paths.pid.with_suffix(".new")
    temporary.write_text(f"{identity.pid} {identity.start_time}\n", encoding="ascii")
    temporary.rename(paths.pid)


def read_pid(paths: Paths) -> "ProcessIdentity | None":
    """The process that said it is the engine; it may have ended since."""
    from devmapper.linux.process import ProcessIdentity

    try:
        words = paths.pid.read_text(encoding="ascii", errors="replace").split()
        return ProcessIdentity(int(words[0]), int(words[1]))
    except (FileNotFoundError, ValueError, IndexError):
        return None


@contextmanager
def _short_name(paths: Paths) -> Iterator[str]:
    """A name for the socket that fits the 108 bytes of `sun_path`, however deep the directory."""
    fd = _open_private(paths.directory)
    try:
        yield f"/proc/self/fd/{fd}/{paths.socket.name}"
    finally:
        os.close(fd)


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError as err:
        raise EnvironmentLacking(
            f"runtime directory {str(path)!r} cannot be made: {err.strerror}",
            hint=f"run as root, or set {ENVIRONMENT} to a directory of your own",
        ) from err
    os.close(_open_private(path))


def _open_private(path: Path) -> int:
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
