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

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from devmapper.engine import runtime as shared
from devmapper.engine.runtime import ENVIRONMENT, SUSPENSION, check_name, runtime_base
from devmapper.errors import EngineError

if TYPE_CHECKING:
    from devmapper.linux.process import ProcessIdentity

__all__ = ["ENVIRONMENT", "SUSPENSION", "Paths", "check_name", "paths_of", "runtime_base"]


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
        return shared.start_lock_of(self.directory)

    def exported(self, name: str) -> Path:
        """The file that stands for the device *name*."""
        return self.export / name


def paths_of(pool: str) -> Paths:
    """The paths for *pool*; nothing is made or looked at.

    The base is resolved, because sysfs names the backing files of loop devices that way.
    """
    return Paths(shared.directory_of(pool))


def make_directories(paths: Paths) -> None:
    """Make the runtime directory and its base; refuse what somebody else may have prepared."""
    shared.make_private(paths.directory.parent)
    shared.make_private(paths.directory)
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
    """Only one process at a time starts or stops the engine of a pool; see `shared.start_lock`."""
    with shared.start_lock(paths.directory, timeout, log=paths.log) as fd:
        yield fd


@contextmanager
def device_lock(paths: Paths, name: str, *, part: int = 0, timeout: float = 60.0) -> Iterator[None]:
    """Only one process at a time changes what stands on a device's file."""
    with ExitStack() as stack:
        lock = shared.device_lock(paths.device_locks, name, part=part, timeout=timeout)
        try:
            stack.enter_context(lock)
        except FileNotFoundError as err:
            raise EngineError(f"pool {paths.directory.name!r} has no engine process") from err
        yield


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
    fd = shared.open_private(paths.directory)
    try:
        yield f"/proc/self/fd/{fd}/{paths.socket.name}"
    finally:
        os.close(fd)
