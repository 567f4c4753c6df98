"""An engine without root, FUSE or a process: real pool metadata, devices that are plain files.

It stores what thin devices hold in one sparse file each, which a snapshot copies.  Pool metadata
are the real ones, so that `thin_check` has a say.  `crash` lets go of a pool without a commit.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devmapper.engine.port import (
    Activation,
    DeviceInfo,
    EngineFeatures,
    Outcome,
    PoolMode,
    PoolStatus,
    PoolTable,
    ThinStatus,
)
from devmapper.errors import ThinBusy, ThinIdExists, ThinIdMissing
from devmapper.thin.blocks import FileDevice
from devmapper.thin.metadata import PoolMetadata, is_blank
from devmapper.units import Bytes, ThinId, TransactionId


class LocalPool:
    """Implements `ThinPool`.  With *eager* every message is committed at once, as a background
    commit could do; without it only where the port promises durability."""

    def __init__(self, name: str, table: PoolTable, *, eager: bool) -> None:
        self.name = name
        self._table = table
        self._eager = eager
        self._contents = table.data_device.parent / "contents"
        self._contents.mkdir(exist_ok=True)
        self._active: dict[str, DeviceInfo] = {}
        self.in_use: set[str] = set()  # names of devices that a test pretends to hold open
        self.broken: dict[str, Exception] = {}  # what a method raises instead of doing its work
        self.suspensions: list[str] = []
        device = FileDevice.open(table.metadata_device)
        blocks = table.data_size // table.block_size
        if is_blank(device):
            self._metadata = PoolMetadata.format(
                device, data_block_size=table.block_size, nr_data_blocks=blocks
            )
        else:
            self._metadata = PoolMetadata.open(device, data_block_size=table.block_size)
            if blocks > self._metadata.nr_data_blocks:
                self._metadata.resize_data(blocks)
                self._metadata.commit()

    def table(self) -> PoolTable:
        return self._table

    def status(self) -> PoolStatus:
        self._fail("status")
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

    def transaction_id(self) -> TransactionId:
        return self.status().transaction_id

    def thin_ids(self) -> list[ThinId]:
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

    def create_thin(self, thin_id: ThinId) -> None:
        self._fail("create_thin")
        self._must_be_free(thin_id)
        self._metadata.create_thin(thin_id)
        self._content(thin_id).write_bytes(b"")
        self._message()

    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        self._fail("create_snap")
        self._must_be_free(thin_id)
        self._must_exist(origin)
        self._metadata.create_snap(thin_id, origin)
        shutil.copyfile(self._content(origin), self._content(thin_id))
        self._message()

    def delete(self, thin_id: ThinId) -> None:
        self._fail("delete")
        self._must_exist(thin_id)
        for info in self._active.values():
            if info.thin_id == thin_id:
                raise ThinBusy(info.name)
        self._metadata.delete(thin_id)
        self._message()

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        self._fail("set_transaction_id")
        self._metadata.set_transaction_id(expected, new)
        self.commit()

    def commit(self) -> None:
        self._metadata.release_data_blocks(self._metadata.commit())

    def resize(self, table: PoolTable) -> None:
        self._metadata.resize_data(table.data_size // table.block_size)
        self._table = table
        self.commit()

    def export_metadata(self, target: Path) -> None:
        self.commit()
        shutil.copyfile(self._table.metadata_device, target)

    def activate(self, name: str, thin_id: ThinId, size: Bytes) -> Path:
        self._must_exist(thin_id)
        if name not in self._active:
            content = self._content(thin_id)
            with content.open("ab") as file:
                file.truncate(size)
            self._active[name] = DeviceInfo(name, thin_id, size, content, Activation.ACTIVE, 0)
        return self._active[name].path

    def deactivate(self, name: str, *, deferred: bool = False) -> Outcome:
        if name in self.in_use:
            raise ThinBusy(name, ["the test"])
        return Outcome.ALREADY if self._active.pop(name, None) is None else Outcome.DONE

    def cancel_deferred(self, name: str) -> Outcome:
        return Outcome.ALREADY

    def info(self, name: str) -> DeviceInfo | None:
        info = self._active.get(name)
        if info is not None and name in self.in_use:
            return info._replace(open_count=1)
        return info

    def devices(self) -> list[DeviceInfo]:
        return list(self._active.values())

    @contextmanager
    def suspended(self, name: str) -> Iterator[None]:
        if name in self._active:
            self.suspensions.append(name)
        yield

    def discard_device(self, name: str) -> None:
        self._fail("discard_device")
        info = self._active[name]
        with info.path.open("wb") as file:
            file.truncate(info.size)

    def close(self) -> None:
        self._metadata.close()

    def _message(self) -> None:
        if self._eager:
            self.commit()

    def _fail(self, method: str) -> None:
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

    def __init__(self, *, eager: bool = False) -> None:
        self.eager = eager
        self.pools: dict[str, LocalPool] = {}

    def features(self) -> EngineFeatures:
        return EngineFeatures(
            "local",
            "1.0 (local)",
            "1.0",
            udev_sync=False,
            udev_sync_needed=False,
            deferred_removal=False,
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
