"""Reading a metadata device under the kernel's hands: as it is on the device, not as we knew it."""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devmapper.linux import blockdev
from devmapper.thin.format import BLOCK_SIZE, MAX_METADATA_BLOCKS


class DirectDevice:
    """A block reader (`thin.walk.BlockReader`) past the page cache.

    The kernel writes metadata with I/O of its own, which the page cache of the device does not see.
    Not thread-safe.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._buffer = mmap.mmap(-1, BLOCK_SIZE)  # O_DIRECT wants it aligned
        self._nr_blocks = min(blockdev.size_of(fd, path) // BLOCK_SIZE, MAX_METADATA_BLOCKS)

    @property
    def nr_blocks(self) -> int:
        return self._nr_blocks

    def read(self, block: int) -> bytes:
        got = os.preadv(self._fd, [self._buffer], block * BLOCK_SIZE)
        if got != BLOCK_SIZE:
            message = f"metadata block {block} cannot be read"
            raise OSError(errno.EIO, message, str(self._path))
        return self._buffer[:]

    def close(self) -> None:
        self._buffer.close()


@contextmanager
def opened(path: Path) -> Iterator[DirectDevice]:
    """The device at *path*, for reading."""
    with blockdev.opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        device = DirectDevice(fd, path)
        try:
            yield device
        finally:
            device.close()
