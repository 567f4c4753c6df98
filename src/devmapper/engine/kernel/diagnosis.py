"""Why the kernel refused a pool's table: it answers EINVAL to nearly everything.

Asked after the refusal only, and read-only: the pool is not active then.
"""

import errno
from pathlib import Path

from devmapper.engine.port import PoolTable
from devmapper.errors import DevmapperError, PoolBusy, PoolMismatch
from devmapper.linux import blockdev, loop
from devmapper.linux.holders import holders
from devmapper.thin.blocks import FileDevice
from devmapper.thin.format import SpaceMapRoot
from devmapper.thin.superblock import is_blank, read_superblock


def explain(err: OSError, table: PoolTable) -> Exception:
    """The error to raise where pool *table* could not be made: *err*, if nothing better is found.

    `PoolMismatch` for sizes that do not fit, `IntegrityError` for damage, `PoolBusy` for a device
    that somebody else has.
    """
    if err.errno == errno.EBUSY:
        return _who_is_busy(err, table)
    try:
        _check_sizes(table)
        _check_metadata(table)
    except (DevmapperError, OSError) as found:
        found.__cause__ = err
        return found
    return err


def _check_sizes(table: PoolTable) -> None:
    size = blockdev.size(table.data_device)
    if size < table.data_size:
        raise PoolMismatch(
            f"data device {str(table.data_device)!r} has {size} bytes, but the pool has"
            f" {table.data_size}",
            hint="the device was cut off, or it belongs to another pool",
        )


def _check_metadata(table: PoolTable) -> None:
    with FileDevice.open(table.metadata_device, read_only=True) as device:
        if is_blank(device):
            if table.read_only:
                raise PoolMismatch(f"no pool is on {str(table.metadata_device)!r} yet")
            return
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
