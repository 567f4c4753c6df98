"""What a pool's devices have to be before the kernel is asked to make it.

The kernel answers EINVAL to most of what can be wrong, and says what only in its log.
"""

import os
from pathlib import Path

from devmapper.engine.port import PoolTable
from devmapper.errors import PoolMismatch, UsageError
from devmapper.linux import blockdev
from devmapper.thin.blocks import FileDevice
from devmapper.thin.format import SpaceMapRoot, Superblock
from devmapper.thin.superblock import is_blank, read_superblock
from devmapper.units import data_block_size


def check(table: PoolTable) -> None:
    """`UsageError` for a table that makes no sense, `PoolMismatch` for one that is not this pool's,
    `IntegrityError` for a damaged superblock, `OSError` for devices that cannot be opened."""
    data_block_size(table.block_size)
    if table.data_size <= 0 or table.data_size % table.block_size:
        raise UsageError(
            f"size of the pool, {table.data_size} bytes, is not a multiple of its block size of"
            f" {table.block_size} bytes"
        )
    if is_same_device(table.metadata_device, table.data_device):
        raise UsageError(
            f"metadata and data of a pool cannot both be on {str(table.data_device)!r}"
        )
    size = blockdev.size(table.data_device)
    if size < table.data_size:
        raise PoolMismatch(
            f"data device {str(table.data_device)!r} has {size} bytes, but the pool has"
            f" {table.data_size}",
            hint="the file was cut off, or it belongs to another pool",
        )
    with FileDevice.open(table.metadata_device, read_only=True) as device:
        if is_blank(device):
            if table.read_only:
                raise PoolMismatch(f"no pool is on {str(table.metadata_device)!r} yet")
            return
        _check_superblock(table, read_superblock(device))


def is_same_device(one: Path, other: Path) -> bool:
    first, second = one.stat(), other.stat()
    if first.st_rdev and first.st_rdev == second.st_rdev:
        return True
    return os.path.samestat(first, second)


def _check_superblock(table: PoolTable, superblock: Superblock) -> None:
    if superblock.block_size != table.block_size:
        raise PoolMismatch(
            f"data blocks of the pool have {superblock.block_size} bytes, but {table.block_size}"
            " were asked for"
        )
    nr_data_blocks = SpaceMapRoot.unpack(superblock.data_space_map_root).nr_blocks
    if table.data_size // table.block_size < nr_data_blocks:
        raise PoolMismatch(
            f"pool on {str(table.metadata_device)!r} has {nr_data_blocks} data blocks, but only"
            f" {table.data_size // table.block_size} are on the data device",
            hint="the data device was cut off, or it belongs to another pool",
        )
