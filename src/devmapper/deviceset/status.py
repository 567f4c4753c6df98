"""What the graph says about itself: the rows of `docker info`, and numbers for programs."""

import os
from pathlib import Path
from typing import NamedTuple

from devmapper.deviceset.space import minimum_free_space
from devmapper.engine.port import EngineFeatures, PoolMode, PoolStatus, ThinStatus
from devmapper.linux.files import file_system_name
from devmapper.thin.format import BLOCK_SIZE
from devmapper.units import SECTOR_SIZE, Bytes, human_size


class DiskUsage(NamedTuple):
    """Bytes of one half of the pool; moby `deviceset.go` DiskUsage.

    *available* is no more than the file system below a loop file has left.
    """

    used: Bytes = Bytes(0)
    total: Bytes = Bytes(0)
    available: Bytes = Bytes(0)


class Status(NamedTuple):
    """A graph and its pool: moby `deviceset.go` Status, sizes in bytes.

    The fields from *backing_file_system* on are not in the seed's.
    """

    pool_name: str
    data_file: str
    data_loopback: str
    metadata_file: str
    metadata_loopback: str
    data: DiskUsage
    metadata: DiskUsage
    sector_size: Bytes  # of a data block, despite its name
    udev_sync_supported: bool
    deferred_remove_enabled: bool
    library_version: str
    backing_file_system: str
    engine: str
    mode: str
    needs_check: bool
    transaction_id: int
    base_device_size: Bytes
    base_file_system: str
    min_free_space: Bytes  # of data, below which no layer is made
    deferred_deletion_enabled: bool
    deferred_deleted_count: int  # layers whose deletion was put off


class DevStatus(NamedTuple):
    """A layer's record and what the pool says about its thin device; moby DevStatus.

    *size* in bytes, the rest in sectors of 512 bytes; mapped are shared ones too.
    """

    device_id: int
    size: Bytes
    transaction_id: int
    size_in_sectors: int
    mapped_sectors: int
    highest_mapped_sector: int


class PoolPaths(NamedTuple):
    """Where the two halves are; the loop files are "" for devices of the user's own."""

    data: str
    data_loopback: str
    metadata: str
    metadata_loopback: str


class BaseLayer(NamedTuple):
    """What is recorded of the base layer; its kind of file system since Docker 1.10."""

    size: Bytes = Bytes(0)
    file_system: str = ""


def graph_status(
    home: Path,
    pool_name: str,
    paths: PoolPaths,
    pool: PoolStatus | None,
    features: EngineFeatures,
    base: BaseLayer,
    *,
    deferred_removal: bool,
    deferred_deletion: bool = False,
    deleted_layers: int = 0,
    min_free_percent: int = 0,
) -> Status:
    """Put together what was asked; without the pool's status all numbers are 0, as in moby."""
    return Status(
        pool_name,
        paths.data,
        paths.data_loopback,
        paths.metadata,
        paths.metadata_loopback,
        _data_usage(pool, paths.data_loopback),
        _metadata_usage(pool, paths.metadata_loopback),
        pool.block_size if pool else Bytes(0),
        features.udev_sync,
        deferred_removal,
        features.library_version,
        file_system_name(home.parent),
        features.name,
        pool.mode if pool else PoolMode.FAIL,
        pool.needs_check if pool else False,
        pool.transaction_id if pool else 0,
        base.size,
        base.file_system,
        minimum_free_space(pool, min_free_percent) if pool else Bytes(0),
        deferred_deletion,
        deleted_layers,
    )


def dev_status(size: Bytes, thin: ThinStatus, transaction_id: int, block_size: Bytes) -> DevStatus:
    per_block = block_size // SECTOR_SIZE
    highest = thin.highest_mapped_block
    return DevStatus(
        thin.thin_id,
        size,
        transaction_id,
        size // SECTOR_SIZE,
        thin.mapped_blocks * per_block,
        0 if highest is None else (highest + 1) * per_block - 1,
    )


def rows(status: Status) -> list[tuple[str, str]]:
    """The rows of `docker info` in moby's order (driver.go Status); ours come last.

    `Backing Filesystem` is that of the directory, as in Docker 1.7; since 1.10 it is the base
    layer's there, which has a row of its own here.
    """
    found = [
        ("Pool Name", status.pool_name),
        ("Pool Blocksize", human_size(status.sector_size)),
        ("Base Device Size", human_size(status.base_device_size)),
        ("Backing Filesystem", status.backing_file_system),
        ("Data file", status.data_file),
        ("Metadata file", status.metadata_file),
        ("Data Space Used", human_size(status.data.used)),
        ("Data Space Total", human_size(status.data.total)),
        ("Data Space Available", human_size(status.data.available)),
        ("Metadata Space Used", human_size(status.metadata.used)),
        ("Metadata Space Total", human_size(status.metadata.total)),
        ("Metadata Space Available", human_size(status.metadata.available)),
        ("Thin Pool Minimum Free Space", human_size(status.min_free_space)),
        ("Udev Sync Supported", _bool(status.udev_sync_supported)),
        ("Deferred Removal Enabled", _bool(status.deferred_remove_enabled)),
        ("Deferred Deletion Enabled", _bool(status.deferred_deletion_enabled)),
        ("Deferred Deleted Device Count", str(status.deferred_deleted_count)),
    ]
    if status.data_loopback:
        found.append(("Data loop file", status.data_loopback))
    if status.metadata_loopback:
        found.append(("Metadata loop file", status.metadata_loopback))
    found.append(("Library Version", status.library_version))
    if status.base_file_system:
        found.append(("Base Filesystem", status.base_file_system))
    found.append(("Engine", status.engine))
    if status.mode != PoolMode.WRITE or status.needs_check:
        # moby ignores these words, so that a pool that no longer takes writes looks healthy
        check = ", needs_check" if status.needs_check else ""
        found.append(("Pool Mode", f"{status.mode}{check}"))
    return found


def _bool(value: bool) -> str:  # noqa: FBT001 - the value is what is spelled
    return "true" if value else "false"


def _data_usage(pool: PoolStatus | None, loopback: str) -> DiskUsage:
    if pool is None:
        return DiskUsage()
    block = pool.block_size
    return _usage(pool.used_data_blocks * block, pool.total_data_blocks * block, loopback)


def _metadata_usage(pool: PoolStatus | None, loopback: str) -> DiskUsage:
    if pool is None:
        return DiskUsage()
    used = pool.used_metadata_blocks * BLOCK_SIZE
    return _usage(used, pool.total_metadata_blocks * BLOCK_SIZE, loopback)


def _usage(used: int, total: int, loopback: str) -> DiskUsage:
    """A sparse file can take no more than its file system has left (moby reads f_bfree)."""
    available = total - used
    if loopback:
        try:
            found = os.statvfs(loopback)
        except OSError:
            pass
        else:
            available = min(available, found.f_bfree * found.f_bsize)
    return DiskUsage(Bytes(used), Bytes(total), Bytes(available))
