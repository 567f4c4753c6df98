"""From a table line to open devices: every check that a pool gets before anything is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from devmapper.engine.claims import check_unclaimed
from devmapper.engine.device_lock import device_lock
from devmapper.engine.embedded.data_file import DataFile
from devmapper.engine.port import PoolTable
from devmapper.engine.tables import check_table
from devmapper.errors import PoolMismatch
from devmapper.thin.blocks import FileDevice, MetadataDevice
from devmapper.thin.metadata import PoolMetadata, is_blank


class PoolDevices(NamedTuple):
    metadata_device: MetadataDevice
    metadata: PoolMetadata
    data: DataFile


@contextmanager
def opened(table: PoolTable) -> Iterator[PoolDevices]:
    """The devices of *table*, checked, locked and closed on every path.

    Blank metadata are formatted, and a pool that is smaller than its table grows, as in the kernel.
    `UsageError` for a table that makes no sense, `PoolMismatch` for one that is not this pool's,
    `PoolBusy` for a pool that is open here or in the kernel, `IntegrityError` for damage,
    `OSError` for the rest.
    """
    check_table(table)
    with device_lock(table.metadata_device, read_only=table.read_only):
        for path in (table.metadata_device, table.data_device):
            check_unclaimed(path)
        data = DataFile.open(table.data_device, read_only=table.read_only)
        try:
            check_data_size(table, data)
            device = FileDevice.open(table.metadata_device, read_only=table.read_only)
            try:
                metadata = _open_metadata(table, device)
                yield PoolDevices(device, metadata, data)
            finally:
                device.close()
        finally:
            data.close()


def check_data_size(table: PoolTable, data: DataFile) -> None:
    """`PoolMismatch` if the data device ends before the pool does."""
    if data.size < table.data_size:
        raise PoolMismatch(
            f"data device {str(table.data_device)!r} has {data.size} bytes, but the pool has"
            f" {table.data_size}",
            hint="the file was cut off, or it belongs to another pool",
        )


def grow(metadata: PoolMetadata, device: MetadataDevice, nr_data_blocks: int) -> None:
    """Let the pool use all of its devices; uncommitted.  The metadata first: data need them."""
    if device.nr_blocks > metadata.nr_metadata_blocks:
        metadata.resize_metadata(device.nr_blocks)
    if nr_data_blocks > metadata.nr_data_blocks:
        metadata.resize_data(nr_data_blocks)


def _open_metadata(table: PoolTable, device: MetadataDevice) -> PoolMetadata:
    nr_data_blocks = table.data_size // table.block_size
    if is_blank(device):
        if table.read_only:
            raise PoolMismatch(f"no pool is on {str(table.metadata_device)!r} yet")
        return PoolMetadata.format(
            device, data_block_size=table.block_size, nr_data_blocks=nr_data_blocks
        )
    metadata = PoolMetadata.open(
        device, data_block_size=table.block_size, read_only=table.read_only
    )
    if nr_data_blocks < metadata.nr_data_blocks:
        raise PoolMismatch(
            f"pool on {str(table.metadata_device)!r} has {metadata.nr_data_blocks} data blocks,"
            f" but only {nr_data_blocks} are on the data device",
            hint="the data device was cut off, or it belongs to another pool",
        )
    if not (table.read_only or metadata.needs_check):
        grow(metadata, device, nr_data_blocks)
        metadata.release_data_blocks(metadata.commit())
    return metadata
