"""Metadata devices: arrays of 4 KiB blocks on a file, a block device or memory.

No checksums, no cache, no knowledge of what is in a block.  Not thread-safe.  Errors are `OSError`.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Protocol, Self

from devmapper.thin.format import BLOCK_SIZE, MAX_METADATA_BLOCKS, ZERO_BLOCK


class MetadataDevice(Protocol):
    """Blocks numbered from 0; what was written survives a power failure after `flush`."""

    @property
    def nr_blocks(self) -> int:
        """Asked anew each time: a device may grow."""

    def read(self, block: int) -> bytes: ...
    def write(self, block: int, data: bytes) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None:
        """Let go of the device; a second call does nothing."""


def _check_range(block: int, nr_blocks: int) -> None:
    if not 0 <= block < nr_blocks:
        raise OSError(
            errno.EINVAL, f"metadata block {block} lies outside of the {nr_blocks} blocks"
        )


def _check_length(data: bytes) -> None:
    if len(data) != BLOCK_SIZE:
        raise OSError(errno.EINVAL, f"{len(data)} bytes are not a metadata block")


class FileDevice:
    """A regular file or a block device.

    More than the 16 GiB that the format can address is not used, as in the kernel.
    """

    def __init__(self, fd: int, path: Path, *, read_only: bool) -> None:
        self._fd = fd
        self.path = path
        self.read_only = read_only

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        flags = os.O_RDONLY if read_only else os.O_RDWR
        fd = os.open(path, flags | os.O_CLOEXEC)
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(fd)
            raise OSError(errno.ENOTBLK, "neither a file nor a block device", str(path))
        return cls(fd, path, read_only=read_only)

    @property
    def nr_blocks(self) -> int:
        # The end by seeking is the size of both kinds; nothing here uses the file offset.
        return min(os.lseek(self._fd, 0, os.SEEK_END) // BLOCK_SIZE, MAX_METADATA_BLOCKS)

    def read(self, block: int) -> bytes:
        if not 0 <= block < MAX_METADATA_BLOCKS:
            _check_range(block, self.nr_blocks)
        data = os.pread(self._fd, BLOCK_SIZE, block * BLOCK_SIZE)
        while len(data) < BLOCK_SIZE:
            more = os.pread(self._fd, BLOCK_SIZE - len(data), block * BLOCK_SIZE + len(data))
            if not more:
                raise OSError(errno.EIO, f"metadata block {block} cannot be read", str(self.path))
            data += more
        return data

    def write(self, block: int, data: bytes) -> None:
        _check_length(data)
        _check_range(block, self.nr_blocks)
        done = 0
        while done < BLOCK_SIZE:
            done += os.pwrite(self._fd, data[done:], block * BLOCK_SIZE + done)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryDevice:
    """Blocks in memory, for tests and for metadata that is never stored."""

    def __init__(self, nr_blocks: int) -> None:
        self._blocks: dict[int, bytes] = {}
        self.nr_blocks = nr_blocks

    def read(self, block: int) -> bytes:
        _check_range(block, self.nr_blocks)
        return self._blocks.get(block, ZERO_BLOCK)

    def write(self, block: int, data: bytes) -> None:
        _check_length(data)
        _check_range(block, self.nr_blocks)
        self._blocks[block] = bytes(data)

    def flush(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to let go of."""
