"""An engine without root, FUSE or a process: real pool metadata, devices that are plain files.

It stores what thin devices hold in one sparse file each, which a snapshot copies.  Pool metadata
are the real ones, so that `thin_check` has a say.  `crash` lets go of a pool without a commit.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devmapper.engine.embedded.metadata_copy import copy_sparse
from devmapper.engine.embedded.opening import grow
from devmapper.engine.port import (
    Activation,
    ChangedRange,
    DeviceInfo,
    EngineFeatures,
    NbdExport,
    Outcome,
    PoolMode,
    PoolStatus,
    PoolTable,
    ThinStatus,
)
from devmapper.engine.ranges import changed_ranges
from devmapper.errors import EnvironmentLacking, PoolMismatch, ThinBusy, ThinIdExists, ThinIdMissing
from devmapper.thin.blocks import FileDevice
from devmapper.thin.delta import own_blocks
from devmapper.thin.metadata import PoolMetadata, is_blank
from devmapper.units import Bytes, ThinId, TransactionId


class LocalPool:
    """Implements `ThinPool`.  With *eager* every message is committed at once, as a background
    commit could do; without it only where the port promises durability."""

    def __init__(self, name: str, table: PoolTable, *, eager: bool) -> None:
        self.name = name
        self.calls: Counter[str] = Counter()
        self._table = table
        self._eager = eager
        self._contents = table.data_device.parent / "contents"
        self._contents.mkdir(exist_ok=True)
        self._active: dict[str, DeviceInfo] = {}
        self.in_use: set[str] = set()  # names of devices that a test pretends to hold open
        self.opened: set[str] = set()  # the same, by what no engine can see: a program's open
        self.broken: dict[str, Exception] = {}  # what a method raises instead of doing its work
        self.suspensions: list[str] = []
        self._device = device = FileDevice.open(table.metadata_device)
        blocks = table.data_size // table.block_size
        if is_blank(device):
            self._metadata = PoolMetadata.format(
                device, data_block_size=table.block_size, nr_data_blocks=blocks
            )
        else:
            self._metadata = PoolMetadata.open(device, data_block_size=table.block_size)
            if blocks < self._metadata.nr_data_blocks:
                self._metadata.close()
                raise PoolMismatch("data device is smaller than the pool")
            grow(self._metadata, device, blocks)
            self._metadata.commit()

    def table(self) -> PoolTable:
        return self._table

    def status(self) -> PoolStatus:
        self._called("status")
        m = self._metadata
        return PoolStatus(
            m.transaction_id,
            m.nr_metadata_blocks - m.nr_free_metadata_blocks,
            m.nr_metadata_blocks,
            m.nr_data_blocks - m.nr_free_data_blocks,
            m.nr_data_blocks,
            self._table.block_size,
            m.held_root,
            PoolMode.WRITE,
            m.needs_check,
            self._table.error_if_no_space,
            True,
            False,
        )

    def thin_ids(self) -> list[ThinId]:
        self._called("thin_ids")
        return self._metadata.thin_ids()

    def thin_status(self, thin_id: ThinId) -> ThinStatus:
        self._must_exist(thin_id)
        found = self._metadata.details(thin_id)
        return ThinStatus(
            thin_id,
            found.mapped_blocks,
            self._metadata.highest_mapped_block(thin_id),
            found.transaction_id,
            found.creation_time,
            found.snapshotted_time,
        )

    def changed_ranges(self, thin_a: ThinId, thin_b: ThinId) -> list[ChangedRange]:
        self._called("changed_ranges")
        self.commit()
        return changed_ranges(self._device, self._metadata.superblock, thin_a, thin_b)

    def own_blocks(self, thin_id: ThinId, origin: ThinId) -> int:
        self._called("own_blocks")
        self.commit()
        return own_blocks(self._device, self._metadata.superblock, thin_id, origin)

    def create_thin(self, thin_id: ThinId) -> None:
        self._called("create_thin")
        self._must_be_free(thin_id)
        self._metadata.create_thin(thin_id)
        self._content(thin_id).write_bytes(b"")
        self._message()

    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        self._called("create_snap")
        self._must_be_free(thin_id)
        self._must_exist(origin)
        self._metadata.create_snap(thin_id, origin)
        shutil.copyfile(self._content(origin), self._content(thin_id))
        self._message()

    def delete(self, thin_id: ThinId) -> None:
        self._called("delete")
        self._must_exist(thin_id)
        for info in self.devices():
            if info.thin_id == thin_id:
                raise ThinBusy(info.name)
        self._metadata.delete(thin_id)
        self._message()

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        self._called("set_transaction_id")
        self._metadata.set_transaction_id(expected, new)
        self.commit()

    def commit(self) -> None:
        self._metadata.release_data_blocks(self._metadata.commit())

    def resize(self, table: PoolTable) -> None:
        grow(self._metadata, self._device, table.data_size // table.block_size)
        self._table = table
        self.commit()

    def export_metadata(self, target: Path) -> None:
        self.commit()
        copy_sparse(self._table.metadata_device, target)

    def activate(self, name: str, thin_id: ThinId, size: Bytes) -> Path:
        self._called("activate")
        self._must_exist(thin_id)
        info = self.info(name)
        if info is not None and info.state is Activation.LEAVING:
            raise ThinBusy(name, ["a deferred removal"])
        if name not in self._active:
            content = self._content(thin_id)
            with content.open("ab") as file:
                file.truncate(size)
            self._active[name] = DeviceInfo(name, thin_id, size, content, Activation.ACTIVE, 0)
        return self._active[name].path

    def deactivate(self, name: str, *, deferred: bool = False) -> Outcome:
        self._called("deactivate")
        info = self.info(name)
        if info is None:
            return Outcome.ALREADY
        if name not in self.in_use | self.opened:
            del self._active[name]
        elif deferred:
            self._active[name] = info._replace(state=Activation.LEAVING)
        else:
            raise ThinBusy(name, ["the test"])
        return Outcome.DONE

    def cancel_deferred(self, name: str) -> Outcome:
        info = self.info(name)
        if info is None or info.state is not Activation.LEAVING:
            return Outcome.ALREADY
        self._active[name] = info._replace(state=Activation.ACTIVE)
        return Outcome.DONE

    def info(self, name: str) -> DeviceInfo | None:
        self._reap()
        info = self._active.get(name)
        if info is not None and name in self.in_use:
            return info._replace(open_count=1)
        return info

    def devices(self) -> list[DeviceInfo]:
        self._reap()
        return list(self._active.values())

    @contextmanager
    def suspended(self, name: str) -> Iterator[None]:
        info = self.info(name)
        if info is not None:
            if info.state is Activation.LEAVING:
                raise ThinBusy(name, ["a deferred removal"])
            self.suspensions.append(name)
        yield

    def discard_device(self, name: str) -> None:
        self._called("discard_device")
        info = self._active[name]
        with info.path.open("wb") as file:
            file.truncate(info.size)

    def serve_nbd(
        self, name: str, thin_id: ThinId, size: Bytes, socket: Path | None, *, read_only: bool
    ) -> NbdExport:
        raise EnvironmentLacking("this engine has plain files")

    def close(self) -> None:
        self._metadata.close()

    def _message(self) -> None:
        if self._eager:
            self.commit()

    def _reap(self) -> None:
        """Devices that are leaving go with their last user."""
        for name, info in list(self._active.items()):
            users = self.in_use | self.opened
            if info.state is Activation.LEAVING and name not in users:
                del self._active[name]

    def _called(self, method: str) -> None:
        self.calls[method] += 1
        if method in self.broken:
            raise self.broken[method]

    def _content(self, thin_id: int) -> Path:
        return self._contents / str(thin_id)

    def _must_exist(self, thin_id: ThinId) -> None:
        if thin_id not in self._metadata.thin_ids():
            raise ThinIdMissing(thin_id)

    def _must_be_free(self, thin_id: ThinId) -> None:
        if thin_id in self._metadata.thin_ids():
            raise ThinIdExists(thin_id)


class LocalEngine:
    """Implements `Engine`; several device sets of one test share one, as they would a machine."""

    def __init__(self, *, eager: bool = False, deferred_removal: bool = False) -> None:
        self.eager = eager
        self.deferred_removal = deferred_removal
        self.pools: dict[str, LocalPool] = {}

    def features(self) -> EngineFeatures:
        return EngineFeatures(
            "local",
            "1.0 (local)",
            "1.0",
            udev_sync=False,
            udev_sync_needed=False,
            deferred_removal=self.deferred_removal,
        )

    def find_pool(self, name: str) -> LocalPool | None:
        return self.pools.get(name)

    def activate_pool(self, name: str, table: PoolTable) -> LocalPool:
        return self.pools.setdefault(name, LocalPool(name, table, eager=self.eager))

    def deactivate_pool(self, name: str) -> Outcome:
        pool = self.pools.pop(name, None)
        if pool is None:
            return Outcome.ALREADY
        pool.commit()
        pool.close()
        return Outcome.DONE

    def crash(self) -> None:
        """The machine loses its power: what was not committed is gone, nothing is active."""
        for pool in self.pools.values():
            pool.close()
        self.pools.clear()
