"""Why the kernel refused a pool's table: it answers EINVAL to nearly everything.

Asked after the refusal only, and read-only: the pool is not active then.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from devmapper.engine.kernel import metadata_device
from devmapper.engine.port import PoolTable
from devmapper.errors import (
    DevmapperError,
    FormatError,
    IntegrityError,
    PoolBusy,
    PoolFull,
    PoolMismatch,
    Space,
)
from devmapper.linux import blockdev, loop
from devmapper.linux.holders import holders
from devmapper.thin.blocks import FileDevice
from devmapper.thin.format import MAGIC, SUPERBLOCK_LOCATION, ZERO_BLOCK, SpaceMapRoot, Superblock
from devmapper.thin.walk import BlockReader, read_superblock

_LEAST_METADATA_BLOCKS: Final = 16  # an empty pool takes eight, and the first commit as many again

# The kernel's words for a block whose checksum, or whose number, is not what it should be
_DAMAGED: Final = (errno.EILSEQ, errno.ENOTBLK)


def explain(err: OSError, table: PoolTable, real: PoolTable) -> Exception:
    """The error to raise where a pool could not be made: *err*, if nothing better is found.

    *table* is what the caller named, *real* the block devices on it.

    `PoolMismatch` for sizes that do not fit, `IntegrityError` for damage, `PoolBusy` for a device
    that somebody else has.
    """
    if err.errno == errno.EBUSY:
        return _who_is_busy(err, real)
    try:
        _check_sizes(table)
        _check_metadata(err, table)
    except DevmapperError as found:
        found.__cause__ = err
        return found
    except OSError as found:
        err.add_note(f"{table.metadata_device}: {found.strerror}")
    if err.errno in _DAMAGED:
        damaged = IntegrityError(
            f"metadata {str(table.metadata_device)!r} are damaged",
            hint="devmapper pool check lists all damage",
        )
        damaged.__cause__ = err
        return damaged
    return err


def _check_sizes(table: PoolTable) -> None:
    size = blockdev.size(table.data_device)
    if size < table.data_size:
        raise PoolMismatch(
            f"data device {str(table.data_device)!r} has {size} bytes, but the pool has"
            f" {table.data_size}",
            hint="the device was cut off, or it belongs to another pool",
        )


def _check_metadata(err: OSError, table: PoolTable) -> None:
    with _reader(table.metadata_device) as device:
        if err.errno == errno.ENOSPC or device.nr_blocks < _LEAST_METADATA_BLOCKS:
            raise PoolFull(Space.METADATA, free=0, needed=_LEAST_METADATA_BLOCKS)
        raw = device.read(SUPERBLOCK_LOCATION)
        if raw == ZERO_BLOCK:
            if table.read_only:
                raise PoolMismatch(f"no pool is on {str(table.metadata_device)!r} yet")
            return
        if (magic := Superblock.unpack(raw).magic) != MAGIC:  # before its checksum: no pool at all
            raise FormatError(SUPERBLOCK_LOCATION, "magic", want=MAGIC, got=magic)
        superblock = read_superblock(device)
        if superblock.block_size != table.block_size:
            raise PoolMismatch(
                f"data blocks of the pool have {superblock.block_size} bytes,"
                f" but {table.block_size} were asked for"
            )
        metadata = SpaceMapRoot.unpack(superblock.metadata_space_map_root).nr_blocks
        if metadata > device.nr_blocks:
            raise PoolMismatch(
                f"metadata device has {device.nr_blocks} blocks, but the pool uses {metadata}"
            )
        data = SpaceMapRoot.unpack(superblock.data_space_map_root).nr_blocks
        wanted = table.data_size // table.block_size
        if data > wanted:
            raise PoolMismatch(
                f"pool on {str(table.metadata_device)!r} has {data} data blocks, but only"
                f" {wanted} are on the data device",
                hint="the data device was cut off, or it belongs to another pool",
            )


@contextmanager
def _reader(path: Path) -> Iterator[BlockReader]:
    """The metadata as they are on a block device, or in a file."""
    if path.is_file():
        with FileDevice.open(path, read_only=True) as file:
            yield file
    else:
        with metadata_device.opened(path) as device:
            yield device


def _who_is_busy(err: OSError, table: PoolTable) -> Exception:
    for path in (table.metadata_device, table.data_device):
        if _is_claimed(path):
            users = holders(path)
            busy = PoolBusy(path, ", ".join(users) or "somebody else")
            busy.__cause__ = err
            return busy
    return err


def _is_claimed(path: Path) -> bool:
    try:
        return loop.is_open_exclusively(path)
    except OSError:
        return False
