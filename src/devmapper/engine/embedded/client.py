"""The embedded engine as commands and daemons use it: the port, over the engine process's socket.

The engine process has the pool; this side has everything that stands on its export: loop devices,
freezing, finding out who uses a device, clearing what a killed engine process left.

One connection for each call: a call costs some 0.2 ms, and no connection outlives a fork, a thread
or the engine process.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from devmapper.engine.activation import Event, next_state
from devmapper.engine.embedded import protocol, runtime
from devmapper.engine.embedded.records import ExportedDevice
from devmapper.engine.port import (
    Activation,
    ChangedRange,
    DeviceInfo,
    EngineFeatures,
    NbdExport,
    Outcome,
    PoolStatus,
    PoolTable,
    ThinStatus,
)
from devmapper.engine.tables import absolute, check_same_table
from devmapper.errors import DevmapperError, EngineError, ThinBusy, UsageError
from devmapper.units import Bytes, ThinId, TransactionId

if TYPE_CHECKING:
    from devmapper.engine.embedded.attachment import Survey

_CONNECT_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 180.0  # a flush waits for queued writes of a full pool up to 60 s
_LOCK_SECONDS: Final = 180.0
_END_SECONDS: Final = 60.0

T = TypeVar("T")


class EmbeddedPoolClient:
    """A pool that an engine process holds; implements `devmapper.engine.port.ThinPool`."""

    def __init__(self, paths: runtime.Paths) -> None:
        self._paths = paths

    @property
    def name(self) -> str:
        return self._paths.directory.name

    def table(self) -> PoolTable:
        return self._ask(PoolTable, "table")

    def status(self) -> PoolStatus:
        return self._ask(PoolStatus, "status")

    def thin_ids(self) -> list[ThinId]:
        return self._ask(list[ThinId], "thin_ids")

    def thin_status(self, thin_id: ThinId) -> ThinStatus:
        return self._ask(ThinStatus, "thin_status", thin_id=thin_id)

    def changed_ranges(self, thin_a: ThinId, thin_b: ThinId) -> list[ChangedRange]:
        return self._ask(list[ChangedRange], "changed_ranges", thin_a=thin_a, thin_b=thin_b)

    def own_blocks(self, thin_id: ThinId, origin: ThinId) -> int:
        return self._ask(int, "own_blocks", thin_id=thin_id, origin=origin)

    def create_thin(self, thin_id: ThinId) -> None:
        self._order("create_thin", thin_id=thin_id)

    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        self._order("create_snap", thin_id=thin_id, origin=origin)

    def delete(self, thin_id: ThinId) -> None:
        self._order("delete", thin_id=thin_id)

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        self._order("set_transaction_id", expected=expected, new=new)

    def commit(self) -> None:
        self._order("commit")

    def resize(self, table: PoolTable) -> None:
        self._order("resize", table=absolute(table))

    def export_metadata(self, target: Path) -> None:
        """Write a copy of the committed metadata to *target*, sparse and durable."""
        from devmapper.engine.embedded.metadata_copy import copy_sparse

        table = self.table()
        if target.exists() and any(
            target.samefile(device) for device in (table.metadata_device, table.data_device)
        ):
            raise UsageError(f"{str(target)!r} is a device of the pool itself")
        copy = self._ask(Path, "export_metadata")
        try:
            copy_sparse(copy, target)
        finally:
            copy.unlink()
            copy.parent.rmdir()

    def activate(self, name: str, thin_id: ThinId, size: Bytes) -> Path:
        """Export the device, then attach a loop device; what is done already stays as it is.

        A command that died between the two has left an export without a loop device: the next call
        goes on from there.
        """
        from devmapper.engine.embedded import attachment

        runtime.check_name(name, "device")
        with runtime.device_lock(self._paths, name):
            done = self._ask(Outcome, "activate", name=name, thin_id=thin_id, size=size)
            try:
                return attachment.attach(self._paths.exported(name))
            except BaseException:
                if done is Outcome.DONE:
                    with suppress(EngineError, ThinBusy):  # the first error is the one to tell
                        self._ask(Outcome, "deactivate", name=name)
                raise

    def deactivate(self, name: str, *, deferred: bool = False) -> Outcome:
        """Detach the loop device and take the device off the export, or end its NBD service.

        In use: `ThinBusy` with who uses it, or LEAVING if *deferred*.
        """
        from devmapper.engine.embedded import attachment

        with runtime.device_lock(self._paths, name):
            entry = self._exported(name)
            if entry is None:
                return Outcome.ALREADY
            if entry.state is Activation.SUSPENDED:
                next_state(name, entry.state, Event.DEACTIVATE)
            if entry.nbd is not None:
                return self._end_nbd(name, entry.nbd, deferred=deferred)
            node = attachment.find(self._paths.exported(name))
            if node is not None and not attachment.detach(node, patient=not deferred):
                if not deferred:
                    raise _busy(name, node)
                return self._defer(name, node)
            self._ask(Outcome, "deactivate", name=name)
            return Outcome.DONE

    def cancel_deferred(self, name: str) -> Outcome:
        """Keep a device that is LEAVING; ALREADY if it is not, or has gone meanwhile."""
        from devmapper.engine.embedded import attachment
        from devmapper.linux import loop

        with runtime.device_lock(self._paths, name):
            if self._ask(Outcome, "cancel_deferred", name=name) is Outcome.ALREADY:
                return Outcome.ALREADY
            entry = self._exported(name)
            if entry is not None and entry.nbd is not None:
                return Outcome.DONE
            node = attachment.find(self._paths.exported(name))
            if node is not None:
                with suppress(OSError):  # its last user has just closed it
                    loop.cancel_autoclear(node)
            if attachment.find(self._paths.exported(name)) is None:
                self._ask(Outcome, "deactivate", name=name)
                return Outcome.ALREADY
            return Outcome.DONE

    def info(self, name: str) -> DeviceInfo | None:
        """The device if it is active; an export without a loop device is not."""
        from devmapper.engine.embedded.attachment import Survey

        entry = self._exported(name)
        return None if entry is None else self._info(entry, Survey())

    def devices(self) -> list[DeviceInfo]:
        from devmapper.engine.embedded.attachment import Survey

        entries = self._all_exported()
        survey = Survey()
        found = (self._info(entry, survey) for entry in entries)
        return [info for info in found if info is not None]

    @contextmanager
    def suspended(self, name: str) -> Iterator[None]:
        """Freeze what is mounted from the device, hold and drain its I/O, flush.

        What a client of NBD has mounted cannot be frozen from here, only its I/O is held: the
        device is then as a loss of power would leave it.  If this process dies meanwhile, the
        engine process notices and undoes all of it.  A failure to resume is raised even where the
        body failed too, with the body's error as its context.
        """
        from devmapper.engine.embedded import freezing
        from devmapper.linux import blockdev

        with ExitStack() as stack:
            stack.enter_context(
                runtime.device_lock(
                    self._paths, name, part=runtime.SUSPENSION, timeout=_LOCK_SECONDS
                )
            )
            info = self._pinned(stack, name)
            if info is None:
                yield
                return
            if info.state is not Activation.ACTIVE:
                next_state(name, info.state, Event.SUSPEND)
            points = [] if info.nbd is not None else freezing.mount_points(info.path)
            connection = stack.enter_context(self._connection())
            announced = [os.fspath(point.path) for point in points]
            _converse(connection, "announce", mount_points=announced)
            stack.callback(_withdraw, connection)
            stack.enter_context(freezing.frozen(points))
            if info.nbd is None:
                blockdev.flush(info.path)  # what programs have written to the bare device
            _converse(connection, "suspend", name=name)
            stack.callback(_converse, connection, "resume")
            yield

    def discard_device(self, name: str) -> None:
        """BLKDISCARD over the whole of the device; ENXIO if it is not active."""
        import errno

        from devmapper.linux import blockdev

        with ExitStack() as stack:
            info = self._pinned(stack, name)
            if info is None:
                raise OSError(errno.ENXIO, "device is not active", name)
            if info.nbd is not None:
                raise _served(name, info.nbd)
            blockdev.discard(info.path)

    def serve_nbd(
        self, name: str, thin_id: ThinId, size: Bytes, socket: Path | None, *, read_only: bool
    ) -> NbdExport:
        """Serve the device on a unix socket of mode 0600, without a file or a loop device."""
        from devmapper.engine.embedded import attachment, nbd_socket

        runtime.check_name(name, "device")
        path = nbd_socket.check_path(socket or nbd_socket.default_path(self._paths, thin_id))
        with runtime.device_lock(self._paths, name):
            entry = self._exported(name)
            if entry is not None and entry.nbd is not None:
                same_place = socket is None or path == entry.nbd.socket
                same = same_place and entry.nbd.read_only == read_only
                if not same or entry.state is Activation.LEAVING:
                    raise _served(name, entry.nbd)
                return entry.nbd
            if entry is not None:
                node = attachment.find(self._paths.exported(name))
                if node is not None:
                    raise ThinBusy(name, (f"its block device {node}",))
                self._ask(Outcome, "deactivate", name=name)  # left by an activation that died
            with nbd_socket.listening(path) as listener, self._connection() as connection:
                args = {
                    "name": name,
                    "thin_id": thin_id,
                    "size": size,
                    "socket": path,
                    "read_only": read_only,
                }
                value = _converse_with(connection, listener.fileno(), "serve_nbd", args)
                return protocol.unpack(NbdExport, value)

    def stop(self) -> None:
        """Deactivate what nobody uses and end the engine process; called with the start lock held.

        `ThinBusy` if a device is in use; nothing was changed then.
        """
        identity = runtime.read_pid(self._paths)
        for device in self.devices():
            if device.nbd is not None and device.nbd.clients:
                raise ThinBusy(device.name, device.nbd.clients)
            if device.open_count:
                raise _busy(device.name, device.path)
        for entry in self._all_exported():
            self.deactivate(entry.name)
        self._order("stop")
        if identity is not None and not identity.wait(_END_SECONDS):
            raise EngineError(
                f"engine process {identity.pid} has closed its pool but does not end",
                hint=f"see {self._paths.log}",
            )

    def _pinned(self, stack: ExitStack, name: str) -> DeviceInfo | None:
        """As `info`, and the block device stays the one it is until *stack* ends.

        Nobody detaches a loop device that somebody has open.  Otherwise its node could be nothing,
        or another layer's device, when it is used.
        """
        from devmapper.linux import blockdev

        with runtime.device_lock(self._paths, name):
            info = self.info(name)
            if info is not None and info.nbd is None:
                stack.enter_context(blockdev.opened(info.path, os.O_RDONLY))
            return info

    def _defer(self, name: str, node: Path) -> Outcome:
        from devmapper.linux import loop

        outcome = self._ask(Outcome, "defer", name=name)
        if loop.detach(node, deferred=True) is not loop.Detached.DEFERRED:
            self._ask(Outcome, "deactivate", name=name)
        return outcome

    def _end_nbd(self, name: str, nbd: NbdExport, *, deferred: bool) -> Outcome:
        from devmapper.engine.embedded import nbd_socket

        if deferred and nbd.clients:
            return self._ask(Outcome, "defer", name=name)
        outcome = self._ask(Outcome, "deactivate", name=name)
        nbd_socket.remove(nbd.socket)
        return outcome

    def _exported(self, name: str) -> ExportedDevice | None:
        return next((entry for entry in self._all_exported() if entry.name == name), None)

    def _all_exported(self) -> list[ExportedDevice]:
        return self._ask(list[ExportedDevice], "devices")

    def _info(self, entry: ExportedDevice, survey: "Survey") -> DeviceInfo | None:
        if entry.nbd is not None:
            users = len(entry.nbd.clients)
            where = entry.nbd.socket
            return DeviceInfo(
                entry.name, entry.thin_id, entry.size, where, entry.state, users, entry.nbd
            )
        node = survey.find(self._paths.exported(entry.name))
        if node is None:
            if entry.state is Activation.LEAVING:
                # Its last user has closed it: gone for the caller means gone for the pool as well
                self._ask(Outcome, "deactivate", name=entry.name)
            return None
        users = survey.users(node)
        return DeviceInfo(entry.name, entry.thin_id, entry.size, node, entry.state, users)

    def _connection(self) -> socket.socket:
        try:
            connection = runtime.connect(self._paths, _CONNECT_SECONDS)
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as err:
            raise protocol.Disconnected(
                f"pool {self.name!r} has no engine process any more",
                hint="the next command that needs the pool starts one",
            ) from err
        connection.settimeout(_ANSWER_SECONDS)
        return connection

    def _ask(self, kind: type[T], op: str, **args: object) -> T:
        with self._connection() as connection:
            return protocol.unpack(kind, _converse(connection, op, **args))

    def _order(self, op: str, **args: object) -> None:
        with self._connection() as connection:
            _converse(connection, op, **args)


class EmbeddedEngine:
    """Pools in user space; implements `devmapper.engine.port.Engine`."""

    def features(self) -> EngineFeatures:
        from importlib.metadata import PackageNotFoundError, version

        try:
            own = version("devmapper")
        except PackageNotFoundError:
            own = "unknown"
        return EngineFeatures(
            name="embedded",
            library_version=f"{own} (embedded)",
            driver_version=own,
            udev_sync=False,
            udev_sync_needed=False,
            deferred_removal=True,
        )

    def find_pool(self, name: str) -> EmbeddedPoolClient | None:
        """The pool if an engine process holds it and answers."""
        pool = EmbeddedPoolClient(runtime.paths_of(name))
        try:
            pool.table()
        except protocol.Disconnected:
            return None
        return pool

    def activate_pool(self, name: str, table: PoolTable) -> EmbeddedPoolClient:
        """The pool, held by an engine process, which is started if there is none.

        What a killed engine process left is cleared first.  `PoolMismatch` if the pool is active
        with other devices or sizes.
        """
        wanted = absolute(table)
        if (pool := self.find_pool(name)) is not None:
            check_same_table(name, pool.table(), wanted)
            return pool
        from devmapper.engine.embedded import leftovers, requirements, starting

        requirements.check()
        paths = runtime.paths_of(name)
        with runtime.start_lock(paths, _LOCK_SECONDS) as lock_fd:
            if (pool := self.find_pool(name)) is not None:
                check_same_table(name, pool.table(), wanted)
                return pool
            starting.await_end(paths, _END_SECONDS)
            leftovers.clear(paths)
            runtime.make_directories(paths)
            try:
                starting.start(paths, wanted, lock_fd)
            except starting.NotReady:
                raise  # all that is known about it is in the directory
            except (DevmapperError, OSError):
                starting.await_end(paths, _END_SECONDS)
                leftovers.clear(paths)
                raise
        return EmbeddedPoolClient(paths)

    def deactivate_pool(self, name: str) -> Outcome:
        """Stop the engine process: I/O drained, committed, loop devices and FUSE mount gone.

        Devices that nobody uses are deactivated with it; `ThinBusy` if one is in use.
        """
        from devmapper.engine.embedded import leftovers, starting

        paths = runtime.paths_of(name)
        if not paths.directory.parent.is_dir():
            return Outcome.ALREADY
        with runtime.start_lock(paths, _LOCK_SECONDS):
            pool = self.find_pool(name)
            if pool is not None:
                pool.stop()
            starting.await_end(paths, _END_SECONDS)
            leftovers.clear(paths)
        return Outcome.ALREADY if pool is None else Outcome.DONE


def _converse(connection: socket.socket, op: str, **args: object) -> object:
    """One request and its reply; an error of the engine process is raised here."""
    return _converse_with(connection, None, op, args)


def _converse_with(
    connection: socket.socket, descriptor: int | None, op: str, args: Mapping[str, object]
) -> object:
    """The same, with a descriptor that goes along."""
    request = {
        "version": protocol.VERSION,
        "op": op,
        "args": {key: protocol.pack(value) for key, value in args.items()},
    }
    try:
        protocol.send(connection, request, descriptor=descriptor)
        reply = protocol.receive(connection)
    except TimeoutError as err:
        raise EngineError(f"engine process does not answer {op!r}") from err
    except (BrokenPipeError, ConnectionResetError) as err:
        raise protocol.Disconnected(f"engine process ended before it answered {op!r}") from err
    if (error := reply.get("error")) is not None:
        raise protocol.unpack_error(error)
    return reply.get("value")


def _withdraw(connection: socket.socket) -> None:
    # Where the engine process is gone, nobody is left who would thaw what we have thawed
    with suppress(EngineError):
        _converse(connection, "withdraw")


def _served(name: str, nbd: NbdExport) -> ThinBusy:
    return ThinBusy(name, nbd.clients or (f"its NBD socket {str(nbd.socket)!r}",))


def _busy(name: str, node: Path) -> ThinBusy:
    from devmapper.linux.holders import holders

    return ThinBusy(name, holders(node))
