"""Reading the metadata of an active pool, which the kernel is writing to meanwhile.

The kernel has no message that lists thin ids.  What a superblock leads to is not overwritten before
the commit after the next one: a block that a transaction frees is used again only by a later one.
So what was read is one commit as a whole if the superblock is the same afterwards.  A pool that
commits all the time is suspended for the last try, for which no write is lost: they wait.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from devmapper.errors import IntegrityError
from devmapper.linux import dm
from devmapper.linux.blockdev import opened, size_of
from devmapper.thin.format import (
    BLOCK_SIZE,
    MAX_METADATA_BLOCKS,
    SUPERBLOCK_LOCATION,
)
from devmapper.units import MIB

_TRIES: Final = 8

T = TypeVar("T")


class DirectReader:
    """Blocks of a metadata device, past the page cache, which does not see what the kernel writes.

    A `BlockReader` of `devmapper.thin.walk`.  Not thread-safe.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._buffer = mmap.mmap(-1, MIB)  # aligned, as O_DIRECT wants it

    @property
    def nr_blocks(self) -> int:
        return min(size_of(self._fd, self._path) // BLOCK_SIZE, MAX_METADATA_BLOCKS)

    def read(self, block: int) -> bytes:
        return self.read_run(block, 1)

    def read_run(self, block: int, count: int) -> bytes:
        """*count* blocks, at most 1 MiB of them."""
        length = count * BLOCK_SIZE
        with memoryview(self._buffer)[:length] as target:
            got = os.preadv(self._fd, [target], block * BLOCK_SIZE)
            if got != length:
                message = f"metadata block {block} cannot be read"
                raise OSError(errno.EIO, message, str(self._path))
            return bytes(target)

    def close(self) -> None:
        self._buffer.close()


@contextmanager
def direct_reader(device: Path) -> Iterator[DirectReader]:
    with opened(device, os.O_RDONLY | os.O_DIRECT) as fd:
        reader = DirectReader(fd, device)
        try:
            yield reader
        finally:
            reader.close()


def read_committed(pool: str, device: Path, read: Callable[[DirectReader], T]) -> T:
    """What *read* makes of the pool's last commit, or of one during the call.

    *read* may be called several times, and what it raises counts only if it read one commit.
    """
    with direct_reader(device) as reader:
        for _ in range(_TRIES):
            before = reader.read(SUPERBLOCK_LOCATION)
            try:
                found = read(reader)
            except (IntegrityError, OSError):
                if reader.read(SUPERBLOCK_LOCATION) == before:
                    raise
                continue
            if reader.read(SUPERBLOCK_LOCATION) == before:
                return found
        with dm.suspended(pool, no_flush=True, skip_lockfs=True):
            return read(reader)
