"""`DeviceSet`: the layers of one graph as thin devices of one pool.

A façade: it puts the graph's lock, the records, the transactions, the pool and the mounts together
and decides in which order they act.  Methods may be called from any thread, and several processes
may have the same graph open.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from devmapper.deviceset.activation import LayerMounts
from devmapper.deviceset.base import ensure_base
from devmapper.deviceset.devinfo import DevInfo, MetaData
from devmapper.deviceset.names import LayerId, file_name, internal_layer_id, layer_id
from devmapper.deviceset.options import Options, parse_options
from devmapper.deviceset.pool import PoolFiles
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.requirements import check_engine
from devmapper.deviceset.session import Graph
from devmapper.deviceset.shutdown import release_devices
from devmapper.deviceset.status import (
    DevStatus,
    PoolPaths,
    Status,
    dev_status,
    graph_status,
)
from devmapper.deviceset.steps import Checkpoint, Step, no_checkpoint
from devmapper.engine.port import Engine, PoolStatus, ThinPool
from devmapper.errors import (
    DevmapperError,
    LayerBusy,
    LayerExists,
    LayerNotFound,
    PoolNotFound,
    ThinBusy,
    UsageError,
)
from devmapper.units import Bytes

log = logging.getLogger(__name__)

DM_LOG_LEVEL: Final = 2  # LogLevelFatal: what libdevmapper says beyond that is not shown
_DM_LOG_DEBUG: Final = 7
DRIVER_DEFERRED_REMOVAL_SUPPORT: Final = False  # what moby's variables start from
ENABLE_DEFERRED_REMOVAL: Final = False


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
    ) -> None:
        """Open the graph in *home*, recovering what a crash left.

        With *do_init* what is missing is made: the home, loop files, the pool, the base layer.
        Without it a graph that is not there is `PoolNotFound`.
        """
        chosen = options if isinstance(options, Options) else parse_options(options)
        self._home = Path(home).absolute()
        self._engine = engine
        if chosen.libdm_log_level is not None:
            from devmapper.linux import libdm

            libdm.set_log_level(chosen.libdm_log_level)
        self._prepare_home(create=do_init)
        self._graph = Graph(self._home, chosen, checkpoint)
        self._files = PoolFiles(self._home, self._graph.names.pool, chosen, checkpoint)
        self._mounts = LayerMounts(self._graph)
        with self._graph.lock.hold():
            self._open(do_init=do_init)

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
    def pool(self) -> ThinPool:
        """The pool itself, for reading; its thin devices are changed through this class only."""
        return self._graph.pool

    @property
    def transaction_id(self) -> int:
        return self._graph.pool.status().transaction_id

    @property
    def next_device_id(self) -> int:
        """The thin id given out last, as the graph's file has it."""
        return self._graph.store.load_deviceset().next_device_id

    def add_device(self, hash: str, base_hash: str, *, size: int | None = None) -> None:  # noqa: A002 - the seed's name
        """Make layer *hash* as a snapshot of *base_hash*, where "" is the base layer.

        A parent whose device is active is suspended while the snapshot is made.
        """
        layer, parent = layer_id(hash), internal_layer_id(base_hash)
        with self._mounts.hold(layer, parent), self._graph.session() as session:
            if session.store.load(layer) is not None:
                raise LayerExists(layer)
            record = session.get(parent)
            if size is not None and size != record.size:
                raise UsageError(
                    "a size of its own for a layer is not supported yet by this version",
                    hint=f"leave it out: the layer has {record.size} bytes as its parent",
                )
            session.create_snap(layer, parent, record)
        log.info("created layer %r from %r", hash, file_name(parent))

    def delete_device(self, hash: str) -> None:  # noqa: A002 - the seed's name
        """Delete a layer; one that is in use is `LayerBusy` at once, and nothing was changed."""
        layer = internal_layer_id(hash)
        with self._mounts.hold(layer):
            with self._graph.session() as session:
                record = session.get(layer)
                self._mounts.check_unused(layer)
                discards = self._graph.options.discard_on_delete
                if discards:
                    record = session.doom(layer, record)
                else:
                    self._mounts.release(layer, seconds=0)
                    session.delete(layer, record)
            if discards:
                self._discard(layer, record)
                self._delete_doomed(layer)
        log.info("deleted layer %r", file_name(layer))

    def mount_device(self, hash: str, path: Path | str, mount_label: str = "") -> None:  # noqa: A002 - the seed's name
        """Mount the layer's file system on *path*, or count one more user of that mount."""
        layer = internal_layer_id(hash)
        users = self._mounts.mount(layer, Path(path), mount_label)
        log.debug("layer %r is mounted on %s, %d users", hash, path, users)

    def unmount_device(self, hash: str) -> None:  # noqa: A002 - the seed's name
        """Take back one `mount_device`; the last one unmounts and deactivates."""
        layer = internal_layer_id(hash)
        self._known(layer)
        self._mounts.unmount(layer)

    def has_device(self, hash: str) -> bool:  # noqa: A002 - the seed's name
        return self._find(internal_layer_id(hash)) is not None

    def has_activated_device(self, hash: str) -> bool:  # noqa: A002 - the seed's name
        layer = internal_layer_id(hash)
        return self._find(layer) is not None and self._mounts.info(layer) is not None

    def is_mounted(self, hash: str) -> bool:  # noqa: A002 - the seed's name
        return self._mounts.mount_point(internal_layer_id(hash)) is not None

    def list(self) -> list[str]:
        """The ids of all layers, sorted; the base layer is ""."""
        records = self._graph.store.load_all()
        return sorted(layer for layer, record in records.items() if not record.deleted)

    def meta_data(self) -> MetaData:
        """All records, those of layers that are being deleted too."""
        names = self._graph.names
        records = self._graph.store.load_all()
        return MetaData({layer: DevInfo.of(layer, records[layer], names) for layer in records})

    def dev_info(self, hash: str) -> DevInfo:  # noqa: A002 - the seed's name
        layer = internal_layer_id(hash)
        return DevInfo.of(layer, self._known(layer), self._graph.names)

    def device_path(self, hash: str) -> Path | None:  # noqa: A002 - the seed's name
        """The layer's block device while it is active."""
        info = self._mounts.info(internal_layer_id(hash))
        return None if info is None else info.path

    def get_device_status(self, hash: str) -> DevStatus:  # noqa: A002 - the seed's name
        """Sizes of one layer; nothing is activated for it, as moby does."""
        record = self._known(internal_layer_id(hash))
        pool = self._graph.pool
        thin = pool.thin_status(record.thin_id)
        return dev_status(record.size, thin, record.transaction_id, pool.status().block_size)

    def status(self) -> Status:
        return graph_status(
            self._home,
            self._graph.names.pool,
            self._paths(),
            self._pool_status(),
            self._engine.features(),
            deferred_removal=self._graph.options.use_deferred_removal,
        )

    def data_device_path(self) -> str:
        """Where data are stored, be it a device or a loop file."""
        return self._paths().data

    def metadata_device_path(self) -> str:
        """Where pool metadata are stored, be it a device or a loop file."""
        return self._paths().metadata

    def inconsistencies(self) -> Sequence[str]:
        """Where records and pool disagree, one sentence each; nothing is repaired by itself."""
        with self._graph.session() as session:
            return session.inconsistencies()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the graph's lock: for a moment, and for nothing that may wait."""
        with self._graph.lock.hold():
            yield

    def resize_pool(self, size: int) -> None:
        """Let the loop file of data, and the pool with it, grow to *size* bytes."""
        with self._graph.session() as session:
            self._files.grow(session.pool, Bytes(size))

    def dm_log(self, level: int, file: str, line: int, dm_error: int, message: str) -> None:
        """Where libdevmapper's own messages go: to the log, and errors only if they are fatal."""
        if level >= _DM_LOG_DEBUG:
            return
        kind = logging.ERROR if level <= DM_LOG_LEVEL else logging.DEBUG
        log.log(kind, "libdevmapper(%d): %s:%d (%d) %s", level, file, line, dm_error, message)

    def shutdown(self) -> None:
        """Unmount and deactivate every layer, let go of the pool, keep the id counter.

        What is in use stays mounted, and so does the pool: `LayerBusy` names it after all the rest
        has been let go.
        """
        with self._graph.session() as session:
            session.save_last_id()
            pool = session.pool
        self._mounts.forget()
        release_devices(pool)
        with self._graph.lock.hold():
            self._engine.deactivate_pool(self._graph.names.pool)
        self._graph.close()

    def close(self) -> None:
        """Let go of the graph; what is active and mounted stays so.  Idempotent."""
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
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not (self._home / "metadata").is_dir():
            raise PoolNotFound(f"there is no graph in {str(self._home)!r}")

    def _open(self, *, do_init: bool) -> None:
        self._graph.store.prepare()
        pool, activated = self._activate(create=do_init)
        try:
            session = self._graph.adopt(pool)
            if do_init:
                ensure_base(session, self._graph.options, verify=activated)
        except Exception:
            if activated:
                self._let_go_again()
            raise

    def _activate(self, *, create: bool) -> tuple[ThinPool, bool]:
        return self._files.activate(
            self._engine,
            create=create,
            before=lambda: check_engine(self._engine.features(), self._graph.options),
            has_layers=self._has_layers,
        )

    def _has_layers(self) -> bool:
        """Whether a record exists that a blank pool cannot have; an interrupted start has one."""
        intent = self._graph.store.load_transaction()
        pending = intent.layer if intent and intent.open_transaction_id == 1 else None
        return any(layer != pending for layer in self._graph.store.layers())

    def _let_go_again(self) -> None:
        try:
            self._engine.deactivate_pool(self._graph.names.pool)
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

    def _discard(self, layer: LayerId, record: LayerRecord) -> None:
        """Give the blocks back to the loop file; a wish, as in moby: errors are only logged."""
        try:
            with self._graph.session() as session:
                self._mounts.activate(session, layer, record)
            self._graph.pool.discard_device(self._graph.names.device(layer))
            self._graph.checkpoint(Step.THIN_DISCARDED)
        except (DevmapperError, OSError) as err:
            log.info("layer %r was not discarded: %s", file_name(layer), err)

    def _delete_doomed(self, layer: LayerId) -> None:
        """Delete what `doom` has marked; if that fails now, the next start does it."""
        try:
            self._mounts.release(layer)
            with self._graph.session() as session:
                record = session.store.load(layer)
                if record is not None and record.deleted:  # else another process was faster
                    session.delete(layer, record)
        except (LayerBusy, ThinBusy) as err:
            log.info("layer %r goes as soon as its device is free: %s", file_name(layer), err)

    def _pool_status(self) -> PoolStatus | None:
        try:
            return self._graph.pool.status()
        except (DevmapperError, OSError) as err:
            log.warning("status of pool %s: %s", self._graph.names.pool, err)
            return None

    def _paths(self) -> PoolPaths:
        try:
            table = self._graph.pool.table()
        except (DevmapperError, OSError):
            table = self._files.table()
        return PoolPaths(
            str(table.data_device),
            self._files.data.loop_file_of(table.data_device),
            str(table.metadata_device),
            self._files.metadata.loop_file_of(table.metadata_device),
        )
