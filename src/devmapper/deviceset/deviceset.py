"""`DeviceSet`: the layers of one graph as thin devices of one pool.

A façade: it puts the graph's lock, the records, the transactions, the pool and the mounts together
and decides in which order they act.  Methods may be called from any thread, and several processes
may have the same graph open.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from devmapper.deviceset.activation import LayerMounts
from devmapper.deviceset.base import ensure_base
from devmapper.deviceset.consistency import Consistency, present_in_pool
from devmapper.deviceset.deletion import DELETION_INTERVAL_SECONDS, Deletion, Deletions
from devmapper.deviceset.delta import LayerDelta, layer_delta
from devmapper.deviceset.devinfo import DevInfo, MetaData
from devmapper.deviceset.disks import LayerDisks
from devmapper.deviceset.id_maps import ROOT, Owner
from devmapper.deviceset.layer_root import make_owned
from devmapper.deviceset.migration import LegacyRecords
from devmapper.deviceset.mountopts import check_label
from devmapper.deviceset.names import BASE, LayerId, file_name, internal_layer_id, layer_id
from devmapper.deviceset.options import Options, parse_options
from devmapper.deviceset.owners import owned_by
from devmapper.deviceset.pool import ActivePool, PoolFiles
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.requirements import check_engine
from devmapper.deviceset.session import Graph
from devmapper.deviceset.setup_config import with_given_pool
from devmapper.deviceset.shutdown import release_devices
from devmapper.deviceset.sizing import create_layer
from devmapper.deviceset.status import (
    BaseLayer,
    DevStatus,
    PoolPaths,
    Status,
    dev_status,
    graph_status,
)
from devmapper.deviceset.steps import Checkpoint, no_checkpoint
from devmapper.deviceset.worker import Worker
from devmapper.engine.port import Engine, NbdExport, PoolStatus, ThinPool
from devmapper.errors import (
    DevmapperError,
    LayerNotFound,
    PoolNotFound,
)
from devmapper.units import Bytes

log = logging.getLogger(__name__)

T = TypeVar("T")

DM_LOG_LEVEL: Final = 2  # LogLevelFatal: what libdevmapper says beyond that is not shown
_DM_LOG_DEBUG: Final = 7
DRIVER_DEFERRED_REMOVAL_SUPPORT: Final = False  # what moby's variables start from
ENABLE_DEFERRED_REMOVAL: Final = False


class Parts(NamedTuple):
    """The objects that `DeviceSet` puts together."""

    graph: Graph
    mounts: LayerMounts
    deletions: Deletions


class DeviceSet:
    """An open graph; `close` lets go of it, `shutdown` also unmounts and stops its pool."""

    def __init__(
        self,
        home: Path | str,
        options: Iterable[str] | Options = (),
        *,
        engine: Engine,
        do_init: bool = True,
        checkpoint: Checkpoint = no_checkpoint,
        owner: Owner = ROOT,
        deletion_interval: float = DELETION_INTERVAL_SECONDS,
    ) -> None:
        """Open the graph in *home*, recovering what a crash left.

        With *do_init* what is missing is made: the home, loop files, the pool, the base layer.
        Without it a graph that is not there is `PoolNotFound`.  *owner* is the root of containers
        in a user namespace, which has to get through the home.  Deletions that were put off are
        tried again every *deletion_interval* seconds while it is open.

        `UsageError` for options, `PoolMismatch` for a pool that is not this graph's,
        `TransactionConflict` and `RecordCorrupt` where files and pool cannot be brought together;
        what was activated for it is let go again.  moby `deviceset.go` NewDeviceSet, initDevmapper.
        """
        chosen = options if isinstance(options, Options) else parse_options(options)
        self._home = Path(home).absolute()
        self._engine = engine
        self.owner = owner
        if chosen.libdm_log_level is not None:
            from devmapper.linux import libdm

            libdm.set_log_level(chosen.libdm_log_level)
        self._prepare_home(create=do_init)
        chosen = with_given_pool(self._home, chosen)
        self._graph = Graph(self._home, chosen, checkpoint)
        self._files = PoolFiles(
            self._home, self._graph.names.pool, chosen, self._graph.store, checkpoint
        )
        self._mounts = LayerMounts(self._graph)
        self._disks = LayerDisks(self._graph, self._mounts)
        self._deletions = Deletions(self._graph, self._mounts)
        self._worker = Worker(
            "deferred deletion", self._deletions.complete_all, interval=deletion_interval
        )
        weakref.finalize(self, self._worker.abandon)  # who forgets `close` leaves no thread behind
        with self._graph.lock.hold():
            doomed = self._open(do_init=do_init)
        self._graph.reopen = _not_keeping(self._reopen)
        if self._deletions.complete(doomed) or chosen.use_deferred_deletion:
            self._worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        return self._graph.is_open

    @property
    def home(self) -> Path:
        return self._home

    @property
    def options(self) -> Options:
        return self._graph.options

    @property
    def engine(self) -> Engine:
        """The engine at work, for asking; its pool is opened and closed through this class only."""
        return self._engine

    @property
    def pool(self) -> ThinPool:
        """The pool itself, for reading; its thin devices are changed through this class only."""
        return self._graph.pool

    @property
    def parts(self) -> Parts:
        """What other ways to see the layers stand on, such as `devmapper.snapshots`."""
        return Parts(self._graph, self._mounts, self._deletions)

    @property
    def transaction_id(self) -> int:
        """The number in the pool that each transaction moves by one; moby TransactionId."""
        return self._graph.pool.status().transaction_id

    @property
    def next_device_id(self) -> int:
        """The thin id given out last, as the graph's file has it; moby DeviceSet.NextDeviceId."""
        return self._graph.store.load_deviceset().next_device_id

    def add_device(
        self,
        hash: str,  # noqa: A002 - the seed's name
        base_hash: str,
        *,
        size: int | None = None,
        owner: str = "",
    ) -> None:
        """Make layer *hash* as a snapshot of *base_hash*, where "" is the base layer.

        A parent whose device is active is suspended while the snapshot is made.  With a *size* in
        bytes, at least the parent's, the layer has it and its file system grows; where that fails
        there is no layer.  Its record remembers an *owner*.  Durable when it returns.

        `UsageError` for ids and sizes that are not fit, `LayerExists`, `LayerNotFound` for the
        parent, `PoolFull` below dm.min_free_space.  moby `deviceset.go` AddDevice.
        """
        layer, parent = layer_id(hash), internal_layer_id(base_hash)
        with self._mounts.hold(layer, parent):
            self._deletions.make_way(layer)
            wanted = None if size is None else Bytes(size)
            extra = owned_by(owner) if owner else ()
            create_layer(self._graph, self._mounts, layer, parent, wanted, extra=extra)
        log.info("created layer %r from %r", hash, file_name(parent))

    def delete_device(self, hash: str) -> Deletion:  # noqa: A002 - the seed's name
        """Delete a layer; one that is in use is `LayerBusy`, and nothing was changed.

        With dm.use_deferred_deletion the layer is gone for everybody at once, and its device and
        blocks when its last user is gone; the result says if that is still to come.  Durable when
        it returns.  `LayerNotFound`.  moby `deviceset.go` DeleteDevice, which tries for 20 s.
        """
        deletion = self._deletions.delete(internal_layer_id(hash))
        if deletion is Deletion.PUT_OFF:
            self._worker.start()
        return deletion

    def mount_device(
        self,
        hash: str,  # noqa: A002 - the seed's name
        path: Path | str,
        mount_label: str = "",
        *,
        user: str = "",
        once: bool = False,
        make_place: Callable[[], object] = lambda: None,
    ) -> None:
        """Mount the layer's file system on *path*, or count one more user of that mount.

        *make_place* is called where it is to be mounted, to make the directory *path*.  A *user*
        with a name is remembered until the next boot, and with *once* counted once only.

        `LayerNotFound`, `LayerBusy` if it is mounted elsewhere, `MountFailed`, `UsageError` for a
        label that is not fit; the layer is as it was then.  moby `deviceset.go` MountDevice.
        """
        check_label(mount_label)
        layer = internal_layer_id(hash)
        self._known(layer)
        users = self._mounts.mount(
            layer, Path(path), mount_label, user=user, once=once, make_place=make_place
        )
        log.debug("layer %r is mounted on %s, %d users", hash, path, users)

    def unmount_device(self, hash: str, *, user: str = "") -> int:  # noqa: A002 - the seed's name
        """Take back one `mount_device`; the last one unmounts and deactivates.

        Returns how many are left.  It is also how the last user of a layer leaves whose deletion
        was put off.  `LayerNotFound`, `LayerNotMounted`; `LayerBusy` after a few seconds, and
        nothing has changed.  moby `deviceset.go` UnmountDevice, which detaches lazily.
        """
        layer = internal_layer_id(hash)
        record = self._graph.store.load(layer)
        if record is None or (record.deleted and self._mounts.mount_point(layer) is None):
            raise LayerNotFound(file_name(layer))
        left = self._mounts.unmount(layer, user=user)
        if record.deleted and left == 0:
            self._deletions.complete([layer])
        return left

    def activate_device(self, hash: str) -> Path:  # noqa: A002 - the seed's name
        """The layer's block device, made if there is none, without a mount.

        `/dev/mapper/<name>` or `/dev/loop<n>`, until `deactivate_device` or `unmount_device`.
        `LayerNotFound`; `LayerBusy` if the layer is served over NBD.
        """
        layer = internal_layer_id(hash)
        self._known(layer)
        return self._disks.activate(layer)

    def deactivate_device(self, hash: str) -> bool:  # noqa: A002 - the seed's name
        """Take the layer's block device away, or end its NBD service; whether there was one.

        `LayerNotFound`; `LayerBusy` with its users, and nothing has changed.  It is also how the
        last user of a layer leaves whose deletion was put off.
        """
        layer = internal_layer_id(hash)
        record = self._graph.store.load(layer)
        if record is None or (record.deleted and self._mounts.info(layer) is None):
            raise LayerNotFound(file_name(layer))
        done = self._disks.deactivate(layer)
        if record.deleted:
            self._deletions.complete([layer])
        return done

    def serve_nbd(
        self,
        hash: str,  # noqa: A002 - the seed's name
        socket: Path | str | None = None,
        *,
        read_only: bool = False,
    ) -> NbdExport:
        """Serve the layer over NBD on a unix socket of mode 0600, until `deactivate_device`.

        Without *socket* the engine chooses where.  Served so already: it stays as it is.
        `LayerNotFound`; `LayerBusy` if it is mounted, has a block device or is served otherwise;
        `UsageError` for a path that cannot be a socket's; `EnvironmentLacking` with the kernel
        engine, which has block devices for everybody.
        """
        layer = internal_layer_id(hash)
        self._known(layer)
        where = None if socket is None else Path(socket)
        return self._disks.serve(layer, where, read_only=read_only)

    def keep_serving(self) -> None:
        """Serve over NBD again, if the engine is killed, what is served now; for a daemon.

        What this process serves itself is so in any case.
        """
        self._disks.learn()

    def nbd_export(self, hash: str) -> NbdExport | None:  # noqa: A002 - the seed's name
        """How the layer is served over NBD now, and to whom; `LayerNotFound`."""
        layer = internal_layer_id(hash)
        self._known(layer)
        info = self._mounts.info(layer)
        return None if info is None else info.nbd

    def has_device(self, hash: str) -> bool:  # noqa: A002 - the seed's name
        """Whether the layer exists; one that is being deleted does not.  moby HasDevice."""
        return self._find(internal_layer_id(hash)) is not None

    def has_activated_device(self, hash: str) -> bool:  # noqa: A002 - the seed's name
        """Whether the layer has a block device now; moby HasActivatedDevice."""
        layer = internal_layer_id(hash)
        return self._find(layer) is not None and self._mounts.info(layer) is not None

    def is_mounted(self, hash: str) -> bool:  # noqa: A002 - the seed's name
        """Whether the layer is mounted in this mount namespace, whoever mounted it."""
        return self._mounts.mount_point(internal_layer_id(hash)) is not None

    def list(self) -> list[str]:
        """The ids of all layers, sorted; the base layer is "".

        moby `deviceset.go` List knows only those that its process has touched.
        """
        records = self._graph.store.load_all()
        return sorted(layer for layer, record in records.items() if not record.deleted)

    def meta_data(self) -> MetaData:
        """All records, those of layers that are being deleted too."""
        names = self._graph.names
        records = self._graph.store.load_all()
        return MetaData({layer: DevInfo.of(layer, records[layer], names) for layer in records})

    def dev_info(self, hash: str) -> DevInfo:  # noqa: A002 - the seed's name
        """The layer's record and the name of its device; `LayerNotFound`."""
        layer = internal_layer_id(hash)
        return DevInfo.of(layer, self._known(layer), self._graph.names)

    def device_path(self, hash: str) -> Path | None:  # noqa: A002 - the seed's name
        """The layer's block device while it is active; its socket while it is served over NBD."""
        info = self._mounts.info(internal_layer_id(hash))
        return None if info is None else info.path

    def delta(self, hash: str, other: str) -> LayerDelta | None:  # noqa: A002 - the seed's name
        """Where the devices of two mounted layers may differ now; None if that is not to be had.

        Both file systems stand still for the moment that it takes to flush them.
        """
        return layer_delta(
            self._graph, self._mounts, internal_layer_id(hash), internal_layer_id(other)
        )

    def get_device_status(self, hash: str) -> DevStatus:  # noqa: A002 - the seed's name
        """Sizes of one layer in bytes and sectors of 512; `LayerNotFound`, `PoolMismatch`.

        Nothing is activated for it, unlike in moby `deviceset.go` GetDeviceStatus.
        """
        layer = internal_layer_id(hash)
        record = self._known(layer)
        with present_in_pool(layer, record.thin_id):
            thin = self._graph.ask(lambda pool: pool.thin_status(record.thin_id))
        block_size = self._graph.pool.status().block_size
        return dev_status(record.size, thin, record.transaction_id, block_size)

    def status(self) -> Status:
        """The graph and its pool at this moment; all numbers are 0 if the pool does not answer.

        moby `deviceset.go` Status, which ignores the pool's mode.
        """
        return self.status_of(self._pool_status())

    def status_of(self, pool: PoolStatus | None) -> Status:
        """As `status`, with what the caller has just asked the pool itself."""
        options = self._graph.options
        return graph_status(
            self._home,
            self._graph.names.pool,
            self._paths(),
            pool,
            self._engine.features(),
            self._base(),
            deferred_removal=options.use_deferred_removal,
            deferred_deletion=options.use_deferred_deletion,
            deleted_layers=len(self._deletions.doomed()),
            min_free_percent=options.min_free_space,
        )

    def ask(self, question: Callable[[ThinPool], T]) -> T:
        """What *question* finds out about the pool; an engine that was killed is started for it."""
        return self._graph.ask(question)

    def data_device_path(self) -> str:
        """Where data are stored, be it a device or a loop file; moby DataDevicePath."""
        return self._paths().data

    def metadata_device_path(self) -> str:
        """Where pool metadata are stored, a device or a loop file; moby MetadataDevicePath."""
        return self._paths().metadata

    def inconsistencies(self) -> Sequence[str]:
        """Where records and pool disagree, one sentence each; nothing is repaired by itself."""
        return self.consistency().findings()

    def consistency(self) -> Consistency:
        """A comparison of all records with the thin ids in the pool."""
        with self._graph.session() as session:
            return session.consistency()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the graph's lock: for a moment, and for nothing that may wait."""
        with self._graph.lock.hold():
            yield

    def resize_pool(self, size: int | None = None, *, metadata_size: int | None = None) -> None:
        """Let the pool grow while it is in use; it cannot shrink (`UsageError`).

        Sizes in bytes, of data and of metadata.  A loop file grows to the size that is given.  A
        device has been enlarged before: without a size the pool takes all of it (moby ResizePool:
        data in loop files only).  Durable when it returns; after a crash amid it the same call, or
        the next start, completes it.
        """
        with self._graph.session() as session:
            self._files.grow(
                session.pool,
                None if size is None else Bytes(size),
                None if metadata_size is None else Bytes(metadata_size),
            )

    def dm_log(self, level: int, file: str, line: int, dm_error: int, message: str) -> None:
        """Where libdevmapper's own messages go: to the log, and errors only if they are fatal.

        *level* is libdevmapper's: 2 fatal to 7 debug.  moby `devmapper_log.go` DMLog, which also
        told errors apart by their text; here nothing is decided.
        """
        if level >= _DM_LOG_DEBUG:
            return
        kind = logging.ERROR if level <= DM_LOG_LEVEL else logging.DEBUG
        log.log(kind, "libdevmapper(%d): %s:%d (%d) %s", level, file, line, dm_error, message)

    def shutdown(self) -> None:
        """Unmount and deactivate every layer, let go of the pool, keep the id counter.

        What is in use stays mounted, and so does the pool: `LayerBusy` names it after all the rest
        has been let go.  moby `deviceset.go` Shutdown.
        """
        self._worker.stop()
        try:
            self._shut_down()
        except Exception:
            if self._graph.options.use_deferred_deletion:
                self._worker.start()  # the graph is still open
            raise
        self._graph.close()

    def close(self) -> None:
        """Let go of the graph; what is active and mounted stays so.  Idempotent."""
        self._worker.stop()
        if not self._graph.is_open:
            return
        try:
            self._graph.keep_last_id()
        except (DevmapperError, OSError) as err:
            # Only a hint for the next start: ids in use are known from records and pool
            log.debug("the last thin id was not kept: %s", err)
        self._graph.close()

    def _prepare_home(self, *, create: bool) -> None:
        if create:
            make_owned(self._home, 0o700, self.owner)
        elif not (self._home / "metadata").is_dir():
            raise PoolNotFound(f"there is no graph in {str(self._home)!r}")

    def _open(self, *, do_init: bool) -> Sequence[LayerId]:
        """Make the graph ready; returns the layers whose deletion is still to be completed."""
        store = self._graph.store
        store.prepare()
        self._legacy = LegacyRecords.read(self._home, store)
        active = self._activate(create=do_init)
        try:
            if self._legacy is not None:
                self._legacy.migrate(store, self._graph.checkpoint)
            session = self._graph.adopt(active.pool)
            if do_init:
                ensure_base(session, self._graph.options, verify=active.verify)
        except Exception:
            if active.activated:
                self._let_go_again()
            raise
        return session.doomed

    def _reopen(self) -> ThinPool:
        """The pool, from an engine that is started for it; call under the graph's lock."""
        pool = self._activate(create=False).pool
        self._worker.start()  # it completes what the engine's end has interrupted
        return pool

    def _activate(self, *, create: bool) -> ActivePool:
        if self._graph.options.use_deferred_removal:
            # Also where the pool is active already: moby 1.7 went on without it, silently
            check_engine(self._engine.features(), self._graph.options)
        return self._files.activate(
            self._engine,
            create=create,
            before=lambda: check_engine(self._engine.features(), self._graph.options),
            has_layers=self._has_layers,
        )

    def _has_layers(self) -> bool:
        """Whether a record exists that a blank pool cannot have; an interrupted start has one."""
        if self._legacy is not None and self._legacy.records:
            return True
        intent = self._graph.store.load_transaction()
        pending = intent.layer if intent and intent.open_transaction_id == 1 else None
        return any(layer != pending for layer in self._graph.store.layers())

    def _shut_down(self) -> None:
        with self._graph.session() as session:
            session.save_last_id()
            pool = session.pool
        self._mounts.forget()
        release_devices(pool)
        self._deletions.complete_all()  # nothing is in use any more
        with self._graph.lock.hold():
            self._files.let_go(self._engine)

    def _let_go_again(self) -> None:
        try:
            self._files.let_go(self._engine)
        except (DevmapperError, OSError) as err:
            log.warning("pool %s stays active: %s", self._graph.names.pool, err)

    def _find(self, layer: LayerId) -> LayerRecord | None:
        record = self._graph.store.load(layer)
        return None if record is None or record.deleted else record

    def _known(self, layer: LayerId) -> LayerRecord:
        record = self._find(layer)
        if record is None:
            raise LayerNotFound(file_name(layer))
        return record

    def _pool_status(self) -> PoolStatus | None:
        try:
            return self._graph.ask(lambda pool: pool.status())
        except (DevmapperError, OSError) as err:
            log.warning("status of pool %s: %s", self._graph.names.pool, err)
            return None

    def _base(self) -> BaseLayer:
        record = self._graph.store.load(BASE)
        stored = self._graph.store.load_deviceset()
        return BaseLayer(Bytes(0) if record is None else record.size, stored.base_file_system)

    def _paths(self) -> PoolPaths:
        try:
            table = self._graph.pool.table()
        except (DevmapperError, OSError):
            if self._files.is_given:
                return PoolPaths("", "", "", "")
            table = self._files.table()
        return PoolPaths(
            str(table.data_device),
            self._files.data.loop_file_of(table.data_device),
            str(table.metadata_device),
            self._files.metadata.loop_file_of(table.metadata_device),
        )


def _not_keeping(reopen: Callable[[], ThinPool]) -> Callable[[], ThinPool]:
    """The same method without a hold on its device set: the worker's thread has the graph."""
    method = weakref.WeakMethod(reopen)

    def call() -> ThinPool:
        found = method()
        if found is None:
            message = "the graph is closed"
            raise RuntimeError(message)
        return found()

    return call
