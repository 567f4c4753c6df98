"""What the export serves: a run of bytes that behaves like a disk.

The border between the data path (`pool`, `device`) and the protocol adapter (`export`): the adapter
knows no thin provisioning, the data path knows no FUSE.
"""

from typing import Protocol

from devmapper.units import Bytes


class BlockTarget(Protocol):
    """A block device in user space; every method may be called from several threads at once.

    Offsets and lengths are bytes inside the device and multiples of a sector.  Errors are `OSError`
    (ENOSPC, EIO, EROFS …): they travel to the caller of the I/O as they are.  A method may block:
    while the device is suspended, and while a full pool queues writes.
    """

    @property
    def size(self) -> Bytes: ...
    @property
    def block_size(self) -> Bytes:
        """Best size of I/O and granularity of discards: the pool's data block."""

    def read(self, offset: int, view: memoryview) -> None:
        """Fill *view* with what is at *offset*; what is not mapped reads as zeros."""

    def write(self, offset: int, view: memoryview) -> None:
        """Store *view* at *offset*."""

    def flush(self) -> None:
        """Return when everything written so far survives a power failure."""

    def discard(self, offset: int, length: int) -> None:
        """Unmap what is covered; afterwards the whole range reads as zeros."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros without unmapping what is mapped."""


class MappedTarget(BlockTarget, Protocol):
    """A target that tells where it has data."""

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """The run of bytes from *offset* as lengths, each with whether it is mapped.

        At least one, and no more than *length* together; neighbours differ.
        """
