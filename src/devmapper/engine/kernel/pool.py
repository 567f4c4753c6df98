"""One active pool of the kernel's device mapper, and the thin devices on it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from devmapper.engine.activation import Event, next_state
from devmapper.engine.kernel import targets, translation
from devmapper.engine.kernel.committed import DirectReader, read_committed
from devmapper.engine.kernel.locks import DeviceLocks
from devmapper.engine.port import (
    Activation,
    DeviceInfo,
    Outcome,
    PoolStatus,
    PoolTable,
    ThinStatus,
)
from devmapper.engine.runtime_dir import check_name
from devmapper.errors import PoolMismatch, PoolNotFound, ThinBusy, ThinIdMissing
from devmapper.linux import blockdev, dm, loop
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.libdm import DeviceState, Target
from devmapper.thin.format import DeviceDetails
from devmapper.thin.walk import (
    DETAILS,
    DEVICES,
    MAPPINGS,
    highest_key,
    lookup,
    read_details,
    read_superblock,
)
from devmapper.units import Bytes, ThinId, TransactionId, thin_id

_LOOP: Final = "loop"


class KernelPool:
    """Implements `devmapper.engine.port.ThinPool`; made by `KernelEngine`.

    Nothing is remembered of the pool but its name: the kernel is asked.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._locks = DeviceLocks(name)

    @property
    def name(self) -> str:
        return self._name

    def table(self) -> PoolTable:
        line = self._line()
        return line.table._replace(
            metadata_device=dm.node_of_number(line.metadata_device),
            data_device=dm.node_of_number(line.data_device),
        )

    def status(self) -> PoolStatus:
        found = dm.find_status(self._name, no_flush=True)
        return self._status(found)

    def thin_ids(self) -> list[ThinId]:
        """From the metadata on disk, which every message has committed."""

        def read(reader: DirectReader) -> list[ThinId]:
            return [ThinId(key) for key in read_details(reader, read_superblock(reader))]

        return read_committed(self._name, self._metadata_device(), read)

    def thin_status(self, thin_id: ThinId) -> ThinStatus:
        dm.find_status(self._name, no_flush=False)  # what was written is counted after a commit

        def read(reader: DirectReader) -> ThinStatus:
            superblock = read_superblock(reader)
            raw = lookup(reader, superblock.device_details_root, thin_id, DETAILS)
            root = lookup(reader, superblock.data_mapping_root, thin_id, DEVICES)
            if raw is None or root is None:
                raise ThinIdMissing(thin_id)
            details = DeviceDetails.unpack(raw)
            return ThinStatus(
                thin_id=thin_id,
                mapped_blocks=details.mapped_blocks,
                highest_mapped_block=highest_key(reader, int.from_bytes(root, "little"), MAPPINGS),
                transaction_id=details.transaction_id,
                creation_time=details.creation_time,
                snapshotted_time=details.snapshotted_time,
            )

        return read_committed(self._name, self._metadata_device(), read)

    def create_thin(self, thin_id: ThinId) -> None:
        check_id(thin_id)
        with translation.of_messages(self.status, new=thin_id):
            dm.message(self._name, f"create_thin {thin_id}")

    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        check_id(thin_id)
        with translation.of_messages(self.status, new=thin_id, existing=origin):
            dm.message(self._name, f"create_snap {thin_id} {origin}")

    def delete(self, thin_id: ThinId) -> None:
        with translation.of_messages(self.status, existing=thin_id):
            dm.message(self._name, f"delete {thin_id}")

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        """The kernel says nothing of a commit that failed but in its mode, so that is looked at."""
        with translation.of_transaction_id(self.status, expected):
            dm.message(self._name, f"set_transaction_id {expected} {new}")
        translation.check_usable(self.status())

    def commit(self) -> None:
        found = dm.find_status(self._name, no_flush=False)
        translation.check_usable(self._status(found))

    def resize(self, table: PoolTable) -> None:
        """Load *table*; the kernel takes what the metadata device has grown by when it resumes.

        The pool is suspended without flushing, so that a full one can grow while writes wait.
        """
        line = self._line()
        now = line.table
        kept = ("block_size", "read_only")
        wrong = [field for field in kept if getattr(now, field) != getattr(table, field)]
        if wrong or table.data_size < now.data_size:
            what = " and ".join(wrong) or "data_size"
            raise PoolMismatch(f"{what} of an active pool cannot change or shrink")
        metadata = dm.node_of_number(line.metadata_device)
        data = dm.node_of_number(line.data_device)
        for node in (metadata, data):
            if node.name.startswith(_LOOP):
                loop.set_capacity(node)
        size = blockdev.size(data)
        if size < table.data_size:
            raise PoolMismatch(
                f"data device {str(data)!r} has {size} bytes, but the pool is to have"
                f" {table.data_size}"
            )
        grown = table._replace(metadata_device=metadata, data_device=data)
        with self._locks.device(self._name):
            dm.reload(self._name, [targets.pool_target(grown)], read_only=table.read_only)
            dm.suspend(self._name, no_flush=True, skip_lockfs=True)
            dm.resume(self._name, flags=dm.POOL_FLAGS)
        translation.check_usable(self.status(), writing=not table.read_only)

    def export_metadata(self, target: Path) -> None:
        from devmapper.engine.kernel.metadata_copy import check_target, copy_committed

        table = self.table()
        check_target(target, table.metadata_device, table.data_device)
        dm.find_status(self._name, no_flush=False)
        copy_committed(self._name, table.metadata_device, target)

    def activate(self, name: str, thin_id: ThinId, size: Bytes) -> Path:
        check_name(name, "device")
        target = targets.thin_target(dm.node_of(self._name), thin_id, size)
        with self._locks.device(name), translation.of_activation(self.status, thin_id):
            try:
                return dm.create(name, [target])
            except OSError as err:
                if err.errno != errno.EBUSY:
                    raise
            return self._activate_existing(name, thin_id, size, target)

    def deactivate(self, name: str, *, deferred: bool = False) -> Outcome:
        """Remove the device; one that a dead process has left suspended is resumed first."""
        with self._locks.device(name):
            state = dm.find(name)
            if state is None:
                return Outcome.ALREADY
            if state.suspended:
                self._resume_if_abandoned(name)
            if deferred and state.deferred_remove:
                return Outcome.ALREADY
            with translation.of_removal(name, dm.node_of(name)):
                dm.remove(name, deferred=deferred)
            return Outcome.DONE

    def cancel_deferred(self, name: str) -> Outcome:
        with self._locks.device(name):
            state = dm.find(name)
            if state is None or not state.deferred_remove:
                return Outcome.ALREADY
            try:
                dm.message(name, "@cancel_deferred_remove")
            except OSError as err:
                if err.errno in (errno.ENXIO, errno.EBUSY):  # its last user has just closed it
                    return Outcome.ALREADY
                raise
            return Outcome.DONE

    def info(self, name: str) -> DeviceInfo | None:
        found = dm.find_table(name)
        return None if found is None else self._info(name, found)

    def devices(self) -> list[DeviceInfo]:
        found = (self.info(name) for name in dm.stacked_on(self._number()))
        return [info for info in found if info is not None]

    @contextmanager
    def suspended(self, name: str) -> Iterator[None]:
        """The kernel freezes the file system, in whichever namespace it is mounted, and drains I/O.

        A process that dies meanwhile leaves the device suspended; the lock, which the kernel then
        lets go of, tells the next one, and `recover` resumes it.
        """
        with self._locks.suspension(name):
            state = dm.find(name)
            if state is None:
                yield
                return
            if state.suspended:
                dm.resume(name)
            if state.deferred_remove:
                next_state(name, Activation.LEAVING, Event.SUSPEND)
            with translation.of_suspension(name):
                dm.suspend(name)
            try:
                yield
            finally:
                dm.resume(name)

    def discard_device(self, name: str) -> None:
        if dm.find(name) is None:
            raise OSError(errno.ENXIO, "device is not active", name)
        blockdev.discard(dm.node_of(name))

    def recover(self) -> None:
        """Resume what dead processes have left suspended: devices of the pool, and the pool."""
        number = self._number()
        if dm.is_suspended(number):
            with self._locks.device(self._name):
                if dm.is_suspended(number):
                    dm.resume(self._name, flags=dm.POOL_FLAGS)
        for entry in _holders(number):
            if _reads_one(entry / "dm/suspended"):
                self._resume_abandoned((entry / "dm/name").read_text(encoding="utf-8").strip())

    def _resume_abandoned(self, name: str) -> None:
        with self._locks.suspension_if_free(name) as is_ours:
            if is_ours:
                dm.resume(name)

    def _resume_if_abandoned(self, name: str) -> None:
        with self._locks.suspension_if_free(name) as is_ours:
            if not is_ours:
                next_state(name, Activation.SUSPENDED, Event.DEACTIVATE)
            dm.resume(name)

    def _activate_existing(self, name: str, thin_id: ThinId, size: Bytes, target: Target) -> Path:
        found = dm.find_table(name)
        if found is None:  # gone meanwhile
            return dm.create(name, [target])
        if not found.state.live_table:  # its maker died between the device and its table
            dm.remove(name)
            return dm.create(name, [target])
        info = self._info(name, found)
        if info is None or (info.thin_id, info.size) != (thin_id, size):
            is_now = "something else" if info is None else f"thin id {info.thin_id}"
            raise ThinBusy(name, (f"a device of that name, which is {is_now}",))
        if info.state is not Activation.ACTIVE:
            next_state(name, info.state, Event.ACTIVATE)
        return info.path

    def _info(self, name: str, found: dm.Device) -> DeviceInfo | None:
        """None for a device that is no thin device of this pool."""
        if [target.kind for target in found.targets] != [targets.THIN]:
            return None
        line = targets.parse_thin_table(found.targets[0])
        return DeviceInfo(
            name,
            line.thin_id,
            line.size,
            dm.node_of(name),
            _activation(found.state),
            found.state.open_count,
        )

    def _line(self) -> targets.PoolLine:
        found = dm.find_table(self._name)
        if found is None or not found.targets:
            raise self._gone()
        return targets.parse_pool_table(found.targets[0])

    def _status(self, found: dm.Device | None) -> PoolStatus:
        if found is None or not found.targets:
            raise self._gone()
        (target,) = found.targets
        return targets.parse_pool_status(target, self._line().table)

    def _number(self) -> DeviceNumber:
        state = dm.find(self._name)
        if state is None:
            raise self._gone()
        return state.number

    def _metadata_device(self) -> Path:
        return dm.node_of_number(self._line().metadata_device)

    def _gone(self) -> PoolNotFound:
        return PoolNotFound(
            f"pool {self._name!r} is not active any more",
            hint="the next command that needs the pool activates it",
        )


def check_id(value: ThinId) -> None:
    thin_id(value)


def _activation(state: DeviceState) -> Activation:
    if state.suspended:
        return Activation.SUSPENDED
    return Activation.LEAVING if state.deferred_remove else Activation.ACTIVE


def _holders(number: DeviceNumber) -> list[Path]:
    try:
        names = os.listdir(f"/sys/dev/block/{number}/holders")
    except FileNotFoundError:
        return []
    return [Path("/sys/block") / name for name in names]


def _reads_one(path: Path) -> bool:
    try:
        return path.read_text(encoding="ascii").strip() == "1"
    except FileNotFoundError:
        return False
