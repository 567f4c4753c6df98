"""The data device of a pool: a regular file or a block device, in bytes.

Knows nothing of mappings.  Every method may be called from any thread; errors are `OSError` with
the path in them.  What was written survives a power failure after the next `sync`.
"""

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from devmapper.linux import blockdev, files
from devmapper.units import MIB, Bytes

COPY_LENGTH: Final = MIB
ZEROS: Final = memoryview(bytes(COPY_LENGTH))
_PLAIN_ZEROS: Final = 64 * 1024  # up to here a write of zeros is as cheap as asking for them

_CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL})


class DataFile:
    """One open data device.

    `unsynced` is set by every write after it is done, and cleared by `sync` before it starts: a
    write that has returned is either covered by a sync under way or makes the next one happen.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path
        self.unsynced = False
        self.punches = True  # until the device says that it cannot
        self._zeroes = True
        self._finds_holes = True
        self._is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._seeking = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """Open it; a block device exclusively, so that it cannot be mounted meanwhile (EBUSY)."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if blockdev.is_block_device(path) and not read_only:
            flags |= os.O_EXCL
        fd = os.open(path, flags | os.O_CLOEXEC)
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            raise OSError(errno.ENOTBLK, "neither a file nor a block device", str(path))
        return cls(fd, path)

    @property
    def size(self) -> Bytes:
        return blockdev.size_of(self.fd, self.path)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read(self, view: memoryview, offset: int) -> None:
        done = os.preadv(self.fd, (view,), offset)
        if done != len(view):
            self._read_rest(view, offset, done)

    def write(self, view: memoryview, offset: int) -> None:
        done = os.pwrite(self.fd, view, offset)
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], offset + done)
        self.unsynced = True

    def sync(self) -> None:
        """Return when everything written before the call is durable; nothing written is cheap.

        After an error the kernel may have dropped what it could not write: a later success says
        nothing about it.
        """
        if not self.unsynced:
            return
        self.unsynced = False
        try:
            os.fdatasync(self.fd)
        except OSError:
            self.unsynced = True
            raise

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros and keep it allocated."""
        if length > _PLAIN_ZEROS and self._zeroes and self._ask(self._zero_range, offset, length):
            self.unsynced = True
            return
        done = 0
        while done < length:
            piece = min(length - done, COPY_LENGTH)
            self.write(ZEROS[:piece], offset + done)
            done += piece

    def clear(self, offset: int, length: int) -> None:
        """As `zero`, for a range that nobody uses yet: a hole is left as it is."""
        if length and not self.is_hole(offset, length):
            self.zero(offset, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a range of the device to another place in it; the two do not overlap."""
        buffer = memoryview(bytearray(min(length, COPY_LENGTH)))
        done = 0
        while done < length:
            piece = buffer[: min(length - done, COPY_LENGTH)]
            self.read(piece, source + done)
            self.write(piece, target + done)
            done += len(piece)

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether the range reads as zeros."""
        if self.is_hole(offset, length):
            return True
        buffer = memoryview(bytearray(min(length, COPY_LENGTH)))
        done = 0
        while done < length:
            piece = buffer[: min(length - done, COPY_LENGTH)]
            self.read(piece, offset + done)
            if piece != ZEROS[: len(piece)]:
                return False
            done += len(piece)
        return True

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the file system has nothing in the range; False where it cannot tell."""
        if self._is_block_device or not self._finds_holes:
            return False
        try:
            with self._seeking:
                return os.lseek(self.fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as err:
            if err.errno == errno.ENXIO:  # no data up to the end of the file
                return True
            self._finds_holes = False
            return False

    def punch(self, offset: int, length: int) -> bool:
        """Give the range back to what is below; False where that cannot, which is remembered."""
        if not self.punches:
            return False
        self.punches = self._ask(self._discard, offset, length)
        return self.punches

    def _read_rest(self, view: memoryview, offset: int, done: int) -> None:
        while done < len(view):
            more = os.preadv(self.fd, (view[done:],), offset + done)
            if more == 0:
                message = f"short read: {done} bytes of {len(view)} at {offset}"
                raise OSError(errno.EIO, message, str(self.path))
            done += more

    def _ask(self, call: Callable[[int, int], None], offset: int, length: int) -> bool:
        try:
            call(offset, length)
        except OSError as err:
            if err.errno not in _CANNOT:
                raise
            return False
        return True

    def _zero_range(self, offset: int, length: int) -> None:
        try:
            if self._is_block_device:
                blockdev.zero_range(self.fd, self.path, offset, length)
            else:
                files.zero_range(self.fd, offset, length)
        except OSError as err:
            self._zeroes = err.errno not in _CANNOT
            raise

    def _discard(self, offset: int, length: int) -> None:
        if self._is_block_device:
            blockdev.discard_range(self.fd, self.path, offset, length)
        else:
            files.punch_hole(self.fd, offset, length)
