"""A thin pool of the kernel's device mapper.

Nothing is remembered that the kernel can be asked for: other processes and Docker work on the same
pool.  Each operation says in its body how many ioctls it takes; they are what it costs.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from devmapper.engine.activation import Event, next_state
from devmapper.engine.kernel import (
    busy,
    devices,
    errors,
    leaving,
    loops,
    metadata_snap,
    queries,
    recovery,
    resizing,
    tableline,
)
from devmapper.engine.kernel.devices import THIN_FLAGS, Found
from devmapper.engine.kernel.locks import PoolLocks, check_plain
from devmapper.engine.kernel.metadata_device import DirectDevice
from devmapper.engine.kernel.status import PoolLine, parse_pool
from devmapper.engine.kernel.tableline import THIN
from devmapper.engine.port import (
    Activation,
    ChangedRange,
    DeviceInfo,
    NbdExport,
    Outcome,
    PoolMode,
    PoolStatus,
    PoolTable,
    ThinStatus,
)
from devmapper.errors import (
    EnvironmentLacking,
    PoolMismatch,
    ThinBusy,
    ThinIdMissing,
    TransactionConflict,
    UsageError,
)
from devmapper.linux import blockdev, dmnode
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.libdm import DeviceState, Target
from devmapper.thin.format import Superblock
from devmapper.units import Bytes, ThinId, TransactionId, thin_id

T = TypeVar("T")


class KernelPool:
    """An active pool; implements `devmapper.engine.port.ThinPool`."""

    def __init__(self, name: str, number: DeviceNumber, locks: PoolLocks) -> None:
        self.name = name
        self._known_number = number
        self._known_line: tableline.PoolLine | None = None
        self._locks = locks

    # The pool

    def table(self) -> PoolTable:
        """One ioctl, and a look at sysfs for the names of the two devices."""
        line = self._line()
        metadata = dmnode.device_path(line.metadata_device)
        return line.table(metadata, dmnode.device_path(line.data_device))

    def status(self) -> PoolStatus:
        """One ioctl.  moby's makes the pool commit; the numbers in memory are as good."""
        found = self._find_status(flush=False)
        line = parse_pool(found.params)
        table = self._table_of(found)
        free = line.total_data_blocks - line.used_data_blocks
        return PoolStatus(
            line.transaction_id,
            line.used_metadata_blocks,
            line.total_metadata_blocks,
            line.used_data_blocks,
            line.total_data_blocks,
            table.block_size,
            line.held_metadata_root,
            line.mode,
            line.needs_check,
            line.error_if_no_space,
            line.discard_passdown,
            low_water_reached=line.mode is not PoolMode.FAIL and free <= table.low_water_mark,
        )

    def thin_ids(self) -> list[ThinId]:
        return self._ask_metadata(queries.thin_ids)

    def thin_status(self, thin_id: ThinId) -> ThinStatus:
        def question(device: DirectDevice, superblock: Superblock) -> ThinStatus:
            return queries.thin_status(device, superblock, thin_id)

        return self._ask_metadata(question)

    def changed_ranges(self, thin_a: ThinId, thin_b: ThinId) -> list[ChangedRange]:
        """Reads as much of the mapping trees as differs."""
        from devmapper.engine.ranges import changed_ranges

        def question(device: DirectDevice, superblock: Superblock) -> list[ChangedRange]:
            return changed_ranges(device, superblock, thin_a, thin_b)

        return self._ask_metadata(question)

    def own_blocks(self, thin_id: ThinId, origin: ThinId) -> int:
        """Reads as much of the mapping trees as differs."""
        from devmapper.thin.delta import own_blocks

        def question(device: DirectDevice, superblock: Superblock) -> int:
            return own_blocks(device, superblock, thin_id, origin)

        return self._ask_metadata(question)

    def create_thin(self, thin_id: ThinId) -> None:
        """One ioctl."""
        self._message(f"create_thin {_id(thin_id)}", thin_id)

    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        """One ioctl."""
        try:
            devices.message(self.name, f"create_snap {_id(thin_id)} {origin}")
        except OSError as err:
            if err.errno == errno.ENODATA:
                raise ThinIdMissing(origin) from err
            raise self._translated(err, thin_id) from err

    def delete(self, thin_id: ThinId) -> None:
        """One ioctl."""
        try:
            devices.message(self.name, f"delete {thin_id}")
        except OSError as err:
            if err.errno == errno.EBUSY:
                raise self._active(thin_id) from err
            raise self._translated(err, thin_id) from err

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        """Two ioctls: the kernel commits after the message, but does not say whether that failed.

        A pool whose commit fails goes back to the one before, so its status tells.
        """
        try:
            devices.message(self.name, f"set_transaction_id {expected} {new}")
        except OSError as err:
            if err.errno == errno.EINVAL:
                line = self._status(flush=False)
                if line.mode is not PoolMode.FAIL and line.transaction_id != expected:
                    raise TransactionConflict(line.transaction_id, expected) from err
            raise self._translated(err) from err
        self._check_committed(new)

    def commit(self) -> None:
        """One ioctl: asking for the status makes the pool commit, and shows whether it could."""
        self._check_committed(None, flush=True)

    def resize(self, table: PoolTable) -> None:
        """Grow to *table*; I/O waits meanwhile and goes on, on every path."""
        with self._locks.suspension(self.name):
            resizing.resize(self.name, self.table(), table)

    def export_metadata(self, target: Path) -> None:
        """Write a copy of the committed metadata to *target*, sparse and durable."""
        from devmapper.engine.kernel import metadata_export

        table = self.table()
        if target.exists() and any(
            path is not None and path.exists() and target.samefile(path)
            for device in (table.metadata_device, table.data_device)
            for path in (device, loops.backing_file(device))
        ):
            raise UsageError(f"{str(target)!r} is a device of the pool itself")

        def question(device: DirectDevice, superblock: Superblock) -> None:
            metadata_export.export(device, superblock, target)

        self._ask_metadata(question)

    # Its devices

    def activate(self, name: str, thin_id: ThinId, size: Bytes) -> Path:
        """Three ioctls: create, load, resume; and udev, where it runs."""
        check_plain(name, "device")
        target = tableline.thin_target(self.name, _id(thin_id), size)
        with self._locks.change(name):
            try:
                path = devices.create(name, target, THIN_FLAGS)
                if path is None:
                    path = self._adopt(name, thin_id, size)
                return path
            except OSError as err:
                raise self._translated(err, thin_id) from err

    def deactivate(self, name: str, *, deferred: bool = False) -> Outcome:
        """Two ioctls: what state it is in, and its removal."""
        with self._locks.change(name):
            state = devices.find_state(name)
            if state is None:
                leaving.tidy(name)
                return Outcome.ALREADY
            if state.suspended and not recovery.resume_if_abandoned(name, self._locks):
                next_state(name, Activation.SUSPENDED, Event.DEACTIVATE)
            if not deferred:
                busy.remove(name, state.number)
            elif state.deferred_remove:
                return Outcome.ALREADY
            elif not devices.remove_deferred(name, state):
                leaving.note(self._locks.directory, name)
            return Outcome.DONE

    def cancel_deferred(self, name: str) -> Outcome:
        """Two ioctls."""
        with self._locks.change(name):
            state = devices.find_state(name)
            if state is None or not state.deferred_remove:
                return Outcome.ALREADY
            try:
                devices.message(name, "@cancel_deferred_remove")
            except OSError as err:
                if err.errno in (errno.ENXIO, errno.EBUSY):  # its last user was faster
                    return Outcome.ALREADY
                raise
            return Outcome.DONE

    def info(self, name: str) -> DeviceInfo | None:
        """One ioctl."""
        found = devices.find(name)
        return None if found is None else self._info(name, found)

    def devices(self) -> list[DeviceInfo]:
        """One ioctl for each device on this pool, however many others there are."""
        infos = []
        for name in dmnode.holders(self._number()):
            found = devices.find(name)
            if found is not None and found.target is not None and found.target.kind == THIN:
                infos.append(self._info(name, found))
        return [info for info in infos if info is not None]

    @contextmanager
    def suspended(self, name: str) -> Iterator[None]:
        """Two ioctls.  The kernel freezes the file system, whatever namespace it is mounted in.

        A process that dies in here leaves the device suspended; the next one that finds it so takes
        that for its own suspension, or resumes it (`recovery`).
        """
        with self._locks.suspension(name):
            with self._locks.change(name):
                state = devices.suspend(name)
                if state is not None and state.deferred_remove:
                    self._resume(name)
                    next_state(name, Activation.LEAVING, Event.SUSPEND)
            if state is None:
                yield
                return
            try:
                yield
            finally:
                self._resume(name)

    def discard_device(self, name: str) -> None:
        """BLKDISCARD over the whole of the device; ENXIO if it is not active."""
        info = self.info(name)
        if info is None:
            raise OSError(errno.ENXIO, "device is not active", name)
        blockdev.discard(info.path)

    def serve_nbd(
        self, name: str, thin_id: ThinId, size: Bytes, socket: Path | None, *, read_only: bool
    ) -> NbdExport:
        """`EnvironmentLacking`: there is no process of ours that could serve it, nor a need."""
        raise EnvironmentLacking(
            "the kernel engine serves no NBD: a layer has a block device there",
            hint="devmapper activate prints its path, which a virtual machine takes as it is",
        )

    # How

    def _status(self, *, flush: bool) -> PoolLine:
        return parse_pool(self._find_status(flush=flush).params)

    def _find_status(self, *, flush: bool) -> Target:
        found = devices.status(self.name, flush=flush)
        if found is None or found.target is None:
            raise errors.not_active(self.name)
        return found.target

    def _table_of(self, status: Target) -> tableline.PoolLine:
        """The table, asked anew when the pool's length has changed: the rest of it cannot."""
        if self._known_line is None or self._known_line.length != status.length:
            self._known_line = self._line()
        return self._known_line

    def _line(self) -> tableline.PoolLine:
        found = devices.find(self.name)
        if found is None or found.target is None:
            raise errors.not_active(self.name)
        self._known_number = found.state.number
        return tableline.parse_pool(found.target)

    def _number(self) -> DeviceNumber:
        state = devices.find_state(self.name)
        if state is None:
            raise errors.not_active(self.name)
        self._known_number = state.number
        return state.number

    def _ask_metadata(self, question: Callable[[DirectDevice, Superblock], T]) -> T:
        metadata = dmnode.device_path(self._line().metadata_device)
        try:
            return metadata_snap.ask(self.name, metadata, self._locks, question)
        except OSError as err:
            raise self._translated(err) from err

    def _message(self, text: str, thin_id: ThinId) -> None:
        try:
            devices.message(self.name, text)
        except OSError as err:
            raise self._translated(err, thin_id) from err

    def _translated(self, err: OSError, thin_id: ThinId | None = None) -> Exception:
        return errors.translate(err, self.name, self.status, thin_id)

    def _check_committed(self, new: TransactionId | None, *, flush: bool = False) -> None:
        line = self._status(flush=flush)
        lost = new is not None and line.transaction_id != new
        if lost or line.mode in (PoolMode.READ_ONLY, PoolMode.FAIL) or line.needs_check:
            raise errors.unusable(self.status())

    def _active(self, thin_id: ThinId) -> ThinBusy:
        for info in self.devices():
            if info.thin_id == thin_id:
                return busy.busy(info.name, info.path)
        return ThinBusy(f"thin id {thin_id}")

    def _info(self, name: str, found: Found) -> DeviceInfo | None:
        if found.target is None:
            return None  # whoever made it has not come further yet, or was killed
        line = self._thin_line(name, found)
        state = found.state
        path = dmnode.path_of(name)
        if state.deferred_remove:
            # Where there is no udev, the library of another program (Docker) has taken it away
            path = dmnode.ensure(name, state.number)
        return DeviceInfo(name, line.thin_id, line.size, path, _activation(state), state.open_count)

    def _thin_line(self, name: str, found: Found) -> tableline.ThinLine:
        """The line of a device on this pool; `PoolMismatch` for any other device."""
        if found.target is not None:
            with suppress(ValueError):
                line = tableline.parse_thin(found.target)
                if line.pool == self._known_number or line.pool == self._number():
                    return line
        raise PoolMismatch(
            f"device {name!r} is no thin device of pool {self.name!r}",
            hint=f"see whose it is: dmsetup table {name}",
        )

    def _adopt(self, name: str, thin_id: ThinId, size: Bytes) -> Path:
        """The device that has the name already: activated before, or half made by a killed one."""
        found = devices.find(name)
        if found is None:
            raise OSError(errno.EAGAIN, "device went away while it was activated", name)
        if found.target is None:
            devices.load(name, tableline.thin_target(self.name, thin_id, size))
            return devices.resume(name, THIN_FLAGS)
        line = self._thin_line(name, found)
        if line.thin_id != thin_id:
            raise PoolMismatch(
                f"device {name!r} is active with thin id {line.thin_id}, expected {thin_id}"
            )
        if found.state.deferred_remove:
            next_state(name, Activation.LEAVING, Event.ACTIVATE)
        if found.state.suspended:
            recovery.resume_if_abandoned(name, self._locks)
        return dmnode.ensure(name, found.state.number)

    def _resume(self, name: str) -> None:
        try:
            devices.resume(name, THIN_FLAGS)
        except OSError as err:
            raise errors.stays_suspended("device", name, err) from err


def _activation(state: DeviceState) -> Activation:
    if state.deferred_remove:
        return Activation.LEAVING
    return Activation.SUSPENDED if state.suspended else Activation.ACTIVE


def _id(value: ThinId) -> ThinId:
    return thin_id(value)
