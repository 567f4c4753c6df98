"""What holds for a pool's table in every engine: whether it makes sense, whether two are one."""

import os
from pathlib import Path

from devmapper.engine.port import PoolTable
from devmapper.errors import PoolMismatch, UsageError
from devmapper.units import data_block_size


def check_table(table: PoolTable) -> None:
    """`UsageError` for a table that no pool can have."""
    data_block_size(table.block_size)
    if table.data_size <= 0 or table.data_size % table.block_size:
        raise UsageError(
            f"size of the pool, {table.data_size} bytes, is not a multiple of its block size of"
            f" {table.block_size} bytes"
        )
    if _is_same_device(table.metadata_device, table.data_device):
        raise UsageError(
            f"metadata and data of a pool cannot both be on {str(table.data_device)!r}"
        )


def absolute(table: PoolTable) -> PoolTable:
    """The table by the devices' own names, whatever directory its reader is in."""
    return table._replace(
        metadata_device=Path(os.path.realpath(table.metadata_device)),
        data_device=Path(os.path.realpath(table.data_device)),
    )


def check_same_table(name: str, active: PoolTable, wanted: PoolTable) -> None:
    """`PoolMismatch`, which names the field, if pool *name* is active with something else."""
    for field in ("metadata_device", "data_device", "data_size", "block_size", "read_only"):
        found, expected = getattr(active, field), getattr(wanted, field)
        if found != expected:
            raise PoolMismatch(
                f"pool {name!r} is active with {field} {str(found)!r}, expected {str(expected)!r}",
                hint="stop its engine first: devmapper engine stop",
            )


def _is_same_device(one: Path, other: Path) -> bool:
    first, second = one.stat(), other.stat()
    if first.st_rdev and first.st_rdev == second.st_rdev:
        return True
    return os.path.samestat(first, second)
