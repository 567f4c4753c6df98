"""Growing an active pool: its metadata first, its data second, each step durable before the next.

The kernel takes what the data device has grown by before it takes what the metadata device has
(`dm-thin.c` pool_preresume), and a pool whose metadata are too small for the bitmaps of new data
turns read-only.  So the two are separate steps here, and room is made sure of in between.
"""

import logging
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.deviceset.backing import Backing, grow_file, take_file_size
from devmapper.deviceset.steps import Checkpoint, Step
from devmapper.engine.port import PoolMode, PoolStatus, PoolTable, ThinPool
from devmapper.errors import PoolFull, PoolUnusable, Space, UsageError
from devmapper.linux import blockdev
from devmapper.thin.format import BLOCK_SIZE, ENTRIES_PER_BITMAP, MAX_METADATA_BLOCKS
from devmapper.units import MAX_METADATA_DEVICE, Bytes

log = logging.getLogger(__name__)

_SPARE_BLOCKS: Final = 32  # of metadata: paths of trees, and the next commit


class Wanted(NamedTuple):
    """New sizes of the two halves; None: what the file or device has."""

    data: Bytes | None = None
    metadata: Bytes | None = None


class PoolGrowth:
    """Grows one active pool.  Call under the graph's lock.

    A growth that was interrupted is completed by the same call, or by `catch_up`.
    """

    def __init__(
        self, pool: ThinPool, data: Backing, metadata: Backing, checkpoint: Checkpoint
    ) -> None:
        self._pool = pool
        self._data = data
        self._metadata = metadata
        self._checkpoint = checkpoint

    def grow(self, wanted: Wanted) -> None:
        """Grow to *wanted*; everything that can be wrong with it is found before a change.

        moby ResizePool: data in a loop file only.  A device has been enlarged by its owner; naming
        a size for it is a check.
        """
        table = self._pool.table()
        status = self._pool.status()
        _check_growable(status)
        data = self._target(self._data, table, wanted.data, Space.DATA)
        metadata = self._target(self._metadata, table, wanted.metadata, Space.METADATA)
        self._check_room(status, _whole(data, table), metadata)
        if self._is_loop_file(self._metadata, table, Space.METADATA):
            self._enlarge(self._metadata, metadata, Step.METADATA_FILE_GROWN)
        self._take_metadata(table, status, metadata)
        if self._is_loop_file(self._data, table, Space.DATA):
            self._enlarge(self._data, data, Step.DATA_FILE_GROWN)
        self._take_data(table, data)
        self._check_grown(_whole(data, table), metadata)

    def catch_up(self) -> None:
        """Take what loop files have more than the pool: somebody was interrupted, or an option.

        A pool that takes no growth now (read-only, needs a check) is left as it is.
        """
        table = self._pool.table()
        data = self._file_size(self._data, table, Space.DATA)
        metadata = self._file_size(self._metadata, table, Space.METADATA)
        more_data = data is not None and _whole(data, table) > table.data_size
        if not more_data and metadata is None:
            return
        status = self._pool.status()
        if not more_data and _blocks(metadata or Bytes(0)) <= status.total_metadata_blocks:
            return
        if not _is_growable(status):
            log.warning("pool %s is in mode %s and does not grow now", self._pool.name, status.mode)
            return
        if metadata is not None:
            self._take_metadata(table, status, metadata)
        if data is not None:
            self._take_data_that_fits(table, data)

    def _file_size(self, half: Backing, table: PoolTable, space: Space) -> Bytes | None:
        if not self._is_loop_file(half, table, space):
            return None
        return blockdev.size(half.device)

    def _take_data_that_fits(self, table: PoolTable, size: Bytes) -> None:
        """The pool goes on with what it has if its metadata are too small for more."""
        try:
            self._check_room(self._pool.status(), _whole(size, table), None)
        except PoolFull as err:
            log.warning("pool %s does not take its larger data file: %s", self._pool.name, err)
        else:
            self._take_data(table, size)

    def _target(self, half: Backing, table: PoolTable, wanted: Bytes | None, space: Space) -> Bytes:
        """The size that this half is going to have."""
        device = _device(table, space)
        if not self._is_loop_file(half, table, space):
            take_file_size(device)
            found = blockdev.size(device)
            if wanted is not None and wanted != found:
                raise UsageError(
                    f"{space} device {str(device)!r} has {found} bytes, but {wanted} were asked"
                    " for",
                    hint="enlarge the device itself, then leave the size out: all of it is taken",
                )
            return found
        found = blockdev.size(half.device)
        if wanted is None:
            return found
        if wanted < found:
            raise UsageError(
                f"pool cannot shrink: {str(half.device)!r} has {found} bytes, {wanted} were asked"
                " for"
            )
        if space is Space.METADATA and wanted > MAX_METADATA_DEVICE:
            raise UsageError(f"size {wanted} of metadata is more than the format can address, 16G")
        return wanted

    def _check_room(self, status: PoolStatus, data: Bytes, metadata: Bytes | None) -> None:
        """`PoolFull` if the bitmaps of more data do not fit into the metadata."""
        blocks = data // status.block_size
        more = blocks // ENTRIES_PER_BITMAP - status.total_data_blocks // ENTRIES_PER_BITMAP
        if more <= 0:
            return
        needed = more + more // 50 + _SPARE_BLOCKS
        total = status.total_metadata_blocks if metadata is None else _blocks(metadata)
        free = max(total, status.total_metadata_blocks) - status.used_metadata_blocks
        if free < needed:
            raise PoolFull(Space.METADATA, free=free, needed=needed)

    def _enlarge(self, half: Backing, size: Bytes, step: Step) -> None:
        if size > blockdev.size(half.device):
            grow_file(half.device, size)
            self._checkpoint(step)

    def _take_metadata(self, table: PoolTable, status: PoolStatus, size: Bytes) -> None:
        if _blocks(size) > status.total_metadata_blocks:
            take_file_size(table.metadata_device)
            self._pool.resize(table)
            self._checkpoint(Step.METADATA_GROWN)

    def _take_data(self, table: PoolTable, size: Bytes) -> None:
        whole = _whole(size, table)
        if whole > table.data_size:
            take_file_size(table.data_device)
            self._pool.resize(table._replace(data_size=whole))
            self._checkpoint(Step.DATA_GROWN)

    def _check_grown(self, data: Bytes, metadata: Bytes) -> None:
        """The kernel only logs that a pool which needs a check did not grow."""
        status = self._pool.status()
        if (
            status.total_data_blocks < data // status.block_size
            or status.total_metadata_blocks < _blocks(metadata)
        ):
            raise PoolUnusable(status.mode, "it did not take its new size")

    def _is_loop_file(self, half: Backing, table: PoolTable, space: Space) -> bool:
        return half.loop_file is not None and bool(half.loop_file_of(_device(table, space)))


def _check_growable(status: PoolStatus) -> None:
    if not _is_growable(status):
        reason = "it asks for a check" if status.needs_check else "it takes no writes"
        raise PoolUnusable(status.mode, f"it cannot grow: {reason}")


def _is_growable(status: PoolStatus) -> bool:
    return not status.needs_check and status.mode in (PoolMode.WRITE, PoolMode.OUT_OF_DATA_SPACE)


def _device(table: PoolTable, space: Space) -> Path:
    return table.data_device if space is Space.DATA else table.metadata_device


def _blocks(metadata_size: Bytes) -> int:
    return min(metadata_size // BLOCK_SIZE, MAX_METADATA_BLOCKS)


def _whole(size: Bytes, table: PoolTable) -> Bytes:
    return Bytes(size - size % table.block_size)
