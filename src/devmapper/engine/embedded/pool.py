"""A thin pool in this process: what the engine's port asks of a pool, but for block devices.

Locks, in the order they are taken: `_administration` here (open devices, snapshots, resizing), the
gate of a device (`traffic`), its lock for changes, the gate for commits, the metadata lock.  I/O on
the fast path takes none of them.  `docs/internals/data-path.md` has the whole picture.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Self, TypeVar

from devmapper.engine.embedded import opening
from devmapper.engine.embedded.commit import COMMIT_PERIOD
from devmapper.engine.embedded.core import PoolCore
from devmapper.engine.embedded.device import ThinDevice
from devmapper.engine.embedded.metadata_copy import copy_sparse
from devmapper.engine.embedded.modes import NO_SPACE_TIMEOUT, PoolState
from devmapper.engine.embedded.opening import PoolDevices
from devmapper.engine.port import ChangedRange, PoolMode, PoolStatus, PoolTable, ThinStatus
from devmapper.engine.ranges import changed_ranges
from devmapper.engine.tables import check_table
from devmapper.errors import (
    IntegrityError,
    PoolFull,
    PoolMismatch,
    PoolUnusable,
    ThinBusy,
    ThinIdMissing,
    UsageError,
)
from devmapper.thin.delta import own_blocks
from devmapper.thin.format import Superblock
from devmapper.thin.metadata import PoolMetadata
from devmapper.thin.walk import BlockReader, read_superblock
from devmapper.units import SECTOR_SIZE, Bytes, ThinId, TransactionId

__all__ = ["EmbeddedPool", "ThinDevice"]

log = logging.getLogger(__name__)

_UNPINNED_TRIES: Final = 3

T = TypeVar("T")


class EmbeddedPool:
    """One open pool; `open` makes it, `close` commits and lets go of it."""

    def __init__(
        self,
        table: PoolTable,
        devices: PoolDevices,
        *,
        name: str = "pool",
        no_space_timeout: float = NO_SPACE_TIMEOUT,
        commit_period: float = COMMIT_PERIOD,
    ) -> None:
        """For devices that the caller has opened and closes; tests bring their own."""
        self._state = PoolState(name, no_space_timeout=no_space_timeout)
        self._metadata_device, metadata, data = devices
        self._core = PoolCore(table, metadata, data, self._state, commit_period=commit_period)
        self._devices: dict[ThinId, ThinDevice] = {}
        self._administration = threading.Lock()
        self._resources = ExitStack()
        self._closed = False
        if table.read_only:
            self._state.make_read_only("its table says so", failed=False)
        elif metadata.needs_check:
            self._state.make_read_only("its metadata need a check", failed=False)
        self._core.start()

    @classmethod
    def open(
        cls,
        table: PoolTable,
        *,
        name: str = "pool",
        no_space_timeout: float = NO_SPACE_TIMEOUT,
        commit_period: float = COMMIT_PERIOD,
    ) -> Self:
        """Open, or format where the metadata device is blank; errors as `opening.opened` has them.

        *no_space_timeout* is how long, in seconds, writes wait for space in a full pool.
        """
        with ExitStack() as undo:
            devices = undo.enter_context(opening.opened(table))
            self = cls(
                table,
                devices,
                name=name,
                no_space_timeout=no_space_timeout,
                commit_period=commit_period,
            )
            self._resources = undo.pop_all()
        log.info("opened pool %s on %s", name, table.metadata_device)
        return self

    def close(self) -> None:
        """Wait for I/O under way, commit and let go; `PoolUnusable` if the commit failed."""
        with self._administration:
            if self._closed:
                return
            self._closed = True
            devices = list(self._devices.values())
        with self._resources:
            for device in devices:
                device.close()
            with self._failures_as_pool_unusable():
                self._core.stop()
        log.info("closed pool %s", self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        return self._state.name

    def table(self) -> PoolTable:
        return self._core.table

    def status(self) -> PoolStatus:
        state, table = self._state, self._core.table
        with self._core.metadata.reading() as metadata:
            return PoolStatus(
                transaction_id=metadata.transaction_id,
                used_metadata_blocks=metadata.nr_metadata_blocks - metadata.nr_free_metadata_blocks,
                total_metadata_blocks=metadata.nr_metadata_blocks,
                used_data_blocks=metadata.nr_data_blocks - metadata.nr_free_data_blocks,
                total_data_blocks=metadata.nr_data_blocks,
                block_size=metadata.data_block_size,
                held_metadata_root=metadata.held_root,
                mode=state.mode,
                needs_check=metadata.needs_check,
                error_if_no_space=table.error_if_no_space,
                discard_passdown=self._core.quarantine.passdown and self._core.data.punches,
                low_water_reached=state.low_water_reached,
            )

    def thin_ids(self) -> list[ThinId]:
        with self._looking() as metadata:
            return metadata.thin_ids()

    def thin_status(self, thin_id: ThinId) -> ThinStatus:
        with self._looking() as metadata:
            details = metadata.details(thin_id)
            return ThinStatus(
                thin_id=thin_id,
                mapped_blocks=details.mapped_blocks,
                highest_mapped_block=metadata.highest_mapped_block(thin_id),
                transaction_id=details.transaction_id,
                creation_time=details.creation_time,
                snapshotted_time=details.snapshotted_time,
            )

    def create_thin(self, thin_id: ThinId) -> None:
        self._change(lambda metadata: metadata.create_thin(thin_id))

    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        """Snapshot *origin*; if it is open, its I/O stops for the moment that this takes.

        Writes that have returned are in the snapshot, later ones are not.
        """
        with self._administration, ExitStack() as stopped:
            device = self._devices.get(origin)
            if device is not None:
                stopped.enter_context(device.traffic.stopped())

            def snap(metadata: PoolMetadata) -> None:
                metadata.create_snap(thin_id, origin)
                if device is not None:
                    device.snapshotted_time = metadata.details(origin).snapshotted_time

            self._change(snap)

    def delete(self, thin_id: ThinId) -> None:
        """Delete; `ThinBusy` while it is open.  Its space is free after the next commit."""
        with self._administration:
            if thin_id in self._devices:
                raise ThinBusy(f"thin id {thin_id}", ("an open device of this pool",))
            self._change(lambda metadata: metadata.delete(thin_id))

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        self._change(lambda metadata: metadata.set_transaction_id(expected, new))
        self.commit()

    def commit(self) -> None:
        """Make everything done so far durable; `PoolUnusable` if that cannot be."""
        with self._failures_as_pool_unusable():
            self._core.commits.run()

    def resize(self, table: PoolTable) -> None:
        """Take over *table*: its features, and the sizes of its devices, which may have grown."""
        with self._administration, self._failures_as_pool_unusable():
            self._check_successor(table)
            opening.check_data_size(table, self._core.data)
            with self._core.metadata.changing() as metadata:
                opening.grow(metadata, self._metadata_device, table.data_size // table.block_size)
            self._core.load(table)
            self._core.commits.run()
            self._core.find_space()

    def export_metadata(self, target: Path) -> None:
        """Commit, then copy the committed metadata to *target*, with holes where they are zero.

        Only commits wait meanwhile.
        """
        if self._state.writable:
            self.commit()
        with self._core.metadata.uncommitted():
            copy_sparse(self._core.table.metadata_device, target)

    def changed_ranges(self, thin_a: ThinId, thin_b: ThinId) -> list[ChangedRange]:
        """Commits; nothing waits meanwhile."""
        return self._compare(
            lambda device, superblock: changed_ranges(device, superblock, thin_a, thin_b)
        )

    def own_blocks(self, thin_id: ThinId, origin: ThinId) -> int:
        """Commits; nothing waits meanwhile."""
        return self._compare(
            lambda device, superblock: own_blocks(device, superblock, thin_id, origin)
        )

    def _compare(self, compare: Callable[[BlockReader, Superblock], T]) -> T:
        """Commit, then let *compare* read the committed trees.

        A commit amid it may let blocks of those trees be reused: then what was read does not
        count.  Where commits come that often the last try keeps them waiting.
        """
        if self._state.writable:
            self.commit()
        for _ in range(_UNPINNED_TRIES):
            with suppress(IntegrityError, ThinIdMissing):  # if they are real, the last try says so
                before = read_superblock(self._metadata_device)
                found = compare(self._metadata_device, before)
                if read_superblock(self._metadata_device) == before:
                    return found
        with self._core.metadata.uncommitted():
            return compare(self._metadata_device, read_superblock(self._metadata_device))

    def open_device(self, thin_id: ThinId, size: Bytes) -> ThinDevice:
        """Open a thin device as a disk of *size* bytes; `ThinBusy` if it is open already."""
        if size <= 0 or size % SECTOR_SIZE:
            raise UsageError(f"size {size} of thin id {thin_id} is not a number of sectors")
        with self._administration:
            if self._closed:
                raise PoolUnusable("closed", "it is being let go of")
            if thin_id in self._devices:
                raise ThinBusy(f"thin id {thin_id}", ("an open device of this pool",))
            with self._looking() as metadata:
                snapshotted_time = metadata.details(thin_id).snapshotted_time
            device = ThinDevice(self._core, thin_id, size, self._forget)
            device.snapshotted_time = snapshotted_time
            self._core.metadata.follow(thin_id, device.cache)
            self._core.traffics |= {device.traffic}
            self._devices[thin_id] = device
            return device

    def _forget(self, device: ThinDevice) -> None:
        with self._administration:
            if self._devices.get(device.thin_id) is device:
                del self._devices[device.thin_id]
                self._core.traffics -= {device.traffic}
                self._core.metadata.unfollow(device.thin_id)

    @contextmanager
    def _looking(self) -> Iterator[PoolMetadata]:
        if self._state.mode is PoolMode.FAIL:
            raise PoolUnusable(self._state.mode, self._state.reason)
        with self._core.metadata.reading() as metadata:
            yield metadata

    def _change(self, change: Callable[[PoolMetadata], None]) -> None:
        """Make a change, once more after a commit if metadata are too full before it."""
        with self._failures_as_pool_unusable():
            try:
                with self._core.metadata.changing() as metadata:
                    change(metadata)
            except PoolFull:
                self._core.commits.run()
                with self._core.metadata.changing() as metadata:
                    change(metadata)

    @contextmanager
    def _failures_as_pool_unusable(self) -> Iterator[None]:
        """An I/O error of the pool's devices has changed its mode, which is what to tell."""
        try:
            yield
        except OSError as err:
            raise PoolUnusable(self._state.mode, str(err)) from err

    def _check_successor(self, table: PoolTable) -> None:
        check_table(table)
        old = self._core.table
        kept = ("metadata_device", "data_device", "block_size", "read_only")
        differing = [name for name in kept if getattr(old, name) != getattr(table, name)]
        if differing or table.data_size < old.data_size:
            what = " and ".join(differing) or "data_size"
            raise PoolMismatch(f"{what} of an open pool cannot change or shrink")
