"""Regular files: durable replacement, locks between processes, sparse files and their holes."""

import errno
import functools
import os
import shlex
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import F_OFD_GETLK, F_OFD_SETLK, F_RDLCK, F_UNLCK, F_WRLCK, fcntl
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Final, Self

from devmapper.linux import libc
from devmapper.units import Bytes

_FALLOC_FL_KEEP_SIZE: Final = 0x01  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE: Final = 0x02
_FALLOC_FL_ZERO_RANGE: Final = 0x10

_FLOCK: Final = Struct("@hhlli4x")  # struct flock of 64-bit Linux: type whence start len pid
_FIRST_POLL_SECONDS: Final = 0.001
_LOCK_POLL_SECONDS: Final = 0.05
_HOLDER_LIMIT: Final = 4096
_MKSTEMP_MODE: Final = 0o600

# Magic numbers and names as Docker's graphdriver.FsNames lists them (linux/magic.h).
_FILE_SYSTEMS: Final[dict[int, str]] = {
    0x61756673: "aufs",
    0x9123683E: "btrfs",
    0x28CD3D45: "cramfs",
    0xEF53: "extfs",
    0xF2F52010: "f2fs",
    0x72B6: "jffs2",
    0x3153464A: "jfs",
    0x6969: "nfs",
    0x858458F6: "ramfs",
    0x52654973: "reiserfs",
    0x517B: "smb",
    0x73717368: "squashfs",
    0x01021994: "tmpfs",
    0x00000000: "unsupported",
    0x58465342: "xfs",
    0x2FC12FC1: "zfs",
}


def save_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace *path* by a file that holds *data*: after a crash it is the old or the new one.

    Durable when it returns.  The temporary file stands in the same directory and its name starts
    with `.tmp`, which Docker skips when it loads records.
    """
    # Plain calls instead of objects: this is done several times for each layer that is made
    directory = os.path.dirname(path)
    fd, temporary = tempfile.mkstemp(prefix=".tmp", dir=directory)
    try:
        try:
            if mode != _MKSTEMP_MODE:
                os.fchmod(fd, mode)
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def unlink_durably(path: Path, *, missing_ok: bool = False) -> None:
    """Remove *path*; when this returns it does not come back after a power failure.

    A file that is already missing may have been removed by somebody who did not get as far as the
    directory's fsync, so that happens in any case.
    """
    path.unlink(missing_ok=missing_ok)
    sync_directory(path.parent)


def sync_directory(path: Path | str) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def make_sparse(path: Path, size: Bytes) -> None:
    """Create a sparse file of *size* bytes, durably; `FileExistsError` if there is one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(fd)
    sync_directory(path.parent)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the range back to the file system; it reads as zeros, the size stays."""
    libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeros and keep it allocated; the size stays.

    EOPNOTSUPP where the file system cannot (tmpfs before 6.x, for one).
    """
    libc.fallocate(fd, _FALLOC_FL_ZERO_RANGE | _FALLOC_FL_KEEP_SIZE, offset, length)


def fallocate(fd: int, offset: int, length: int) -> None:
    """Reserve space for the range, growing the file if it ends before."""
    libc.fallocate(fd, 0, offset, length)


def allocated_bytes(path: Path) -> Bytes:
    """What the file takes on its file system: less than its size if it has holes."""
    return Bytes(path.stat().st_blocks * 512)


def file_system_free(path: Path) -> Bytes:
    """Bytes that an unprivileged user can still write on the file system that holds *path*.

    `f_bavail`, not the `f_bfree` that Docker reads: what is reserved for root is not ours.
    """
    found = os.statvfs(path)
    return Bytes(found.f_bavail * found.f_frsize)


def file_system_name(path: Path) -> str:
    """Docker's name for the file system that holds *path*, `<unknown>` for one it does not list."""
    return _FILE_SYSTEMS.get(libc.statfs_type(str(path)), "<unknown>")


class FileLock:
    """An open-file-description lock on a file of its own (fcntl(2), F_OFD_SETLK).

    The lock goes with the descriptor: two `FileLock`s of one process exclude each other, and the
    kernel lets go of it when the holder dies.  The file is never removed.  The one who takes the
    lock writes its process id and command into the file, so that others can name it, and on a
    second line what else others should know of it, its note.

    A `FileLock` belongs to one thread at a time.  Waiting sleeps: take no other lock before.
    """

    def __init__(self, path: Path, *, note: str = "") -> None:
        self.path = path
        self._note = note
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self, *, shared: bool = False, timeout: float = 0.0) -> None:
        """Take the lock within *timeout* seconds, or raise `BlockingIOError` (EAGAIN)."""
        if self._fd is not None:
            raise OSError(errno.EDEADLK, "lock is already held by this object", str(self.path))
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _wait_for_lock(fd, F_RDLCK if shared else F_WRLCK, timeout, self.path)
            if not shared:
                _write_holder(fd, self._note)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Let go of the lock; nothing to do if it is not held."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            # A child that was forked while we held it shares the description: closing is not enough
            _unlock(fd, 0, 0)
        finally:
            os.close(fd)

    def holder(self) -> str:
        """Who took the lock exclusively last, such as `process 42 (devmapper serve)`.

        Text for people: by the time it is read the holder may be another one.
        """
        return self._line(0) or "another process"

    def note(self) -> str | None:
        """The note of whoever holds the lock exclusively now; None if nobody does.

        The lock is not taken for that, so it is in nobody's way.
        """
        try:
            with open(self.path, "rb") as file:
                request = _FLOCK.pack(F_RDLCK, os.SEEK_SET, 0, 0, 0)
                kind = _FLOCK.unpack(fcntl(file, F_OFD_GETLK, request))[0]
        except FileNotFoundError:
            return None
        return None if kind == F_UNLCK else self._line(1)

    def _line(self, number: int) -> str:
        try:
            with open(self.path, "rb") as file:
                lines = file.read(2 * _HOLDER_LIMIT).decode(errors="surrogateescape").split("\n")
        except OSError:
            return ""
        return lines[number].strip() if number < len(lines) else ""

    def __enter__(self) -> Self:
        if self._fd is None:
            self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@contextmanager
def locked(path: Path, *, shared: bool = False, timeout: float = 0.0) -> Iterator[FileLock]:
    """Hold a `FileLock` on *path*; `BlockingIOError` when *timeout* seconds were not enough."""
    lock = FileLock(path)
    lock.acquire(shared=shared, timeout=timeout)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def locked_place(path: Path, number: int, *, timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock *number* (of 61 bits) of the many in one file, which is made when needed.

    Each is two bytes of the file: whoever waits has the first one meanwhile, so that those who
    come again and again do not keep others from it for ever.  `BlockingIOError` when *timeout*
    seconds were not enough.
    """
    begin = 2 * number
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + timeout
        _wait_for_lock(fd, F_WRLCK, timeout, path, begin=begin, length=1)
        left = max(0.0, deadline - time.monotonic())
        try:
            _wait_for_lock(fd, F_WRLCK, left, path, begin=begin + 1, length=1)
        finally:
            _unlock(fd, begin, 1)
        yield
    finally:
        try:
            _unlock(fd, begin, 2)  # closing is not enough, see `FileLock.release`
        finally:
            os.close(fd)


def is_sparse(path: Path) -> bool:
    """Whether a regular file takes less space than its size."""
    found = path.stat()
    return stat.S_ISREG(found.st_mode) and found.st_blocks * 512 < found.st_size


def _unlock(fd: int, begin: int, length: int) -> None:
    fcntl(fd, F_OFD_SETLK, _FLOCK.pack(F_UNLCK, os.SEEK_SET, begin, length, 0))


def _wait_for_lock(
    fd: int, kind: int, timeout: float, path: Path, *, begin: int = 0, length: int = 0
) -> None:
    """Lock *length* bytes, 0 for all that follow, within *timeout* seconds."""
    request = _FLOCK.pack(kind, os.SEEK_SET, begin, length, 0)
    pause = _FIRST_POLL_SECONDS
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl(fd, F_OFD_SETLK, request)
        except OSError as err:
            if err.errno not in (errno.EAGAIN, errno.EACCES):
                raise OSError(err.errno, f"lock: {err.strerror}", str(path)) from err
        else:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise BlockingIOError(errno.EAGAIN, "lock is held by another process", str(path))
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LOCK_POLL_SECONDS)


def _write_holder(fd: int, note: str) -> None:
    text = _own_name(os.getpid())
    if note:
        text += os.fsencode(note) + b"\n"
    # Mostly it was this process as well that had the lock last
    if os.pread(fd, len(text) + 1, 0) == text:
        return
    os.ftruncate(fd, 0)
    os.pwrite(fd, text, 0)


@functools.lru_cache(maxsize=1)
def _own_name(pid: int) -> bytes:
    """This process, whose id is the key: a child that was forked has another."""
    try:
        with open("/proc/self/cmdline", "rb") as file:
            words = file.read().rstrip(b"\0").split(b"\0")
    except OSError:
        words = []
    command = shlex.join(word.decode(errors="replace") for word in words).replace("\n", "\\n")
    name = f"process {pid} ({command})".encode()
    return name[: _HOLDER_LIMIT - 1] + b"\n"
