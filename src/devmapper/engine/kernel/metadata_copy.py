"""A copy of an active pool's metadata: one commit, whole, with its space maps."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from devmapper.engine.kernel.committed import DirectReader, read_committed
from devmapper.errors import UsageError
from devmapper.thin.format import (
    BITMAP,
    BLOCK_SIZE,
    ENTRIES_PER_BITMAP,
    METADATA_INDEX,
    SUPERBLOCK_LOCATION,
    MetadataIndex,
    SpaceMapRoot,
    unpack_bitmap,
)
from devmapper.thin.walk import read_block, read_superblock
from devmapper.units import MIB

_LONGEST_RUN: Final = MIB // BLOCK_SIZE
_IN_USE: Final = re.compile(rb"[^\0]+")


def copy_committed(pool: str, device: Path, target: Path) -> None:
    """Write the pool's last commit to *target*, a sparse file as large as the device; durable.

    Only the blocks that its space map has in use; the rest are holes.  Memory is bounded.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    writer = os.open(target, flags, 0o600)
    try:

        def copy(reader: DirectReader) -> None:
            os.ftruncate(writer, 0)
            os.ftruncate(writer, reader.nr_blocks * BLOCK_SIZE)
            for first, count in _runs_in_use(reader):
                _write(writer, reader.read_run(first, count), first * BLOCK_SIZE)

        read_committed(pool, device, copy)
        os.fsync(writer)
    finally:
        os.close(writer)


def check_target(target: Path, *devices: Path) -> None:
    """`UsageError` if the copy would be written over a device of the pool itself."""
    if target.exists() and any(target.samefile(device) for device in devices):
        raise UsageError(f"{str(target)!r} is a device of the pool itself")


def _runs_in_use(reader: DirectReader) -> Iterator[tuple[int, int]]:
    """Consecutive metadata blocks in use, at most 1 MiB at a time, from the superblock on."""
    superblock = read_superblock(reader, SUPERBLOCK_LOCATION)
    root = SpaceMapRoot.unpack(superblock.metadata_space_map_root)
    index = MetadataIndex.unpack(read_block(reader, root.bitmap_root, METADATA_INDEX))
    nr_bitmaps = -(-root.nr_blocks // ENTRIES_PER_BITMAP)
    for at, entry in enumerate(index.entries[:nr_bitmaps]):
        counts = unpack_bitmap(read_block(reader, entry.blocknr, BITMAP))
        for run in _IN_USE.finditer(counts):
            for first in range(run.start(), run.end(), _LONGEST_RUN):
                length = min(_LONGEST_RUN, run.end() - first)
                yield at * ENTRIES_PER_BITMAP + first, length


def _write(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
