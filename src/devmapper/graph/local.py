"""A graph that this process has opened: what commands ask of it, in terms of the driver.

The daemon answers its clients with the same object, so that it makes no difference who holds the
graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from devmapper.deviceset.deletion import Deletion
from devmapper.deviceset.id_maps import IdMap
from devmapper.deviceset.names import LayerId, layer_of_file
from devmapper.deviceset.owners import Ownership, ownership_of
from devmapper.errors import LayerNotFound, UsageError
from devmapper.graph.model import (
    ActiveDevice,
    EngineInfo,
    GraphInfo,
    IdMaps,
    LayerDetails,
    LayerRow,
    NbdService,
    PoolInfo,
    Progress,
)
from devmapper.linux.files import allocated_bytes

if TYPE_CHECKING:
    from devmapper.deviceset.consistency import Consistency
    from devmapper.driver import Driver
    from devmapper.engine.port import Engine, NbdExport
    from devmapper.layerdiff.changes import Change
    from devmapper.snapshots import Snapshots

_USER: Final = "cli"  # as whom commands use a mount


class LocalGraph:
    """Implements `OpenGraph`.  Methods may be called from any thread."""

    def __init__(self, driver: "Driver", snapshots: "Snapshots | None" = None) -> None:
        """*snapshots*: those of the daemon, which knows them by heart.  Both stay the caller's."""
        self.driver = driver
        self._devices = driver.devices
        self._store = driver.devices.parts.graph.store
        self._snapshots = snapshots

    def create(self, layer: str, parent: str = "", *, size: int | None = None) -> None:
        if parent:
            self._check_has_directory(parent)
        options = None if size is None else {"size": str(size)}
        self.driver.create(layer, parent, storage_opt=options)

    def remove(self, layer: str, *, force: bool = False) -> bool:
        self._require(layer)
        belongs_to = self._ownership(layer)
        if belongs_to.owner and not force:
            raise UsageError(
                f"layer {layer!r} belongs to {belongs_to}",
                hint=f"remove it by way of {belongs_to.owner}, or use devmapper rm --force",
            )
        if belongs_to.snapshot is not None:
            return self._remove_snapshot(layer, belongs_to.snapshot.key)
        return self.driver.remove(layer) is Deletion.PUT_OFF

    def get(self, layer: str, label: str = "") -> str:
        self._check_has_directory(layer)
        return self.driver.get(layer, label, user=_USER, once=True)

    def put(self, layer: str) -> None:
        self.driver.put(layer, user=_USER)

    def exists(self, layer: str) -> bool:
        return self.driver.exists(layer)

    def layers(self) -> tuple[LayerRow, ...]:
        records = self._store.load_all()
        usage = self.driver.usage(records)
        active = {device.thin_id for device in self._devices.ask(lambda pool: pool.devices())}
        found = []
        for each in usage:
            layer = layer_of_file(each.id)
            is_active = each.thin_id in active
            record = records.get(layer)
            found.append(
                LayerRow(
                    *each,
                    is_active,
                    is_active and self._devices.is_mounted(layer),
                    Ownership() if record is None else ownership_of(record),
                )
            )
        return tuple(found)

    def inspect(self, layer: str) -> LayerDetails:
        self._require(layer)
        details = self._devices.dev_info(layer)
        path = self._devices.device_path(layer)
        usage = [each for each in self.driver.usage() if each.id == layer]
        mounted = self._devices.is_mounted(layer)
        if not usage:
            raise LayerNotFound(layer)
        return LayerDetails(
            LayerRow(*usage[0], path is not None, mounted, self._ownership(layer)),
            details.transaction_id,
            details.initialized,
            details.name(),
            None if path is None else str(path),
            str(self.driver.home / "mnt" / layer) if mounted else None,
        )

    def info(self) -> GraphInfo:
        return GraphInfo(
            str(self.driver),
            self._devices.status().engine,
            len(self.driver.layers()),
            tuple(self.driver.status()),
        )

    def pool(self) -> PoolInfo:
        found = self._devices.status()
        return PoolInfo(
            found.pool_name,
            found.engine,
            str(found.mode),
            found.needs_check,
            found.transaction_id,
            found.sector_size,
            found.data,
            found.metadata,
            found.data_file,
            found.metadata_file,
            allocated_bytes(Path(found.data_loopback)) if found.data_loopback else None,
        )

    def id_maps(self) -> IdMaps:
        ids = self.driver.ids
        return IdMaps(
            tuple(IdMap(*each) for each in ids.uid_maps),
            tuple(IdMap(*each) for each in ids.gid_maps),
        )

    def resize(self, size: int | None = None, *, metadata: int | None = None) -> PoolInfo:
        if size is None and metadata is None and self._devices.status().data_loopback:
            raise UsageError(
                "pool is on loop files, which grow to a size that is given",
                hint="devmapper pool resize 200G",
            )
        self._devices.resize_pool(size, metadata_size=metadata)
        return self.pool()

    def activate(self, layer: str) -> str:
        return self.driver.activate(layer)

    def deactivate(self, layer: str) -> bool:
        return self.driver.deactivate(layer)

    def serve_nbd(self, layer: str, socket: str = "", *, read_only: bool = False) -> NbdService:
        return _nbd_service(self._devices.serve_nbd(layer, socket or None, read_only=read_only))

    def stop_nbd(self, layer: str) -> bool:
        return self._devices.nbd_export(layer) is not None and self.driver.deactivate(layer)

    def consistency(self) -> "Consistency":
        return self._devices.consistency()

    def engine(self) -> EngineInfo:
        return engine_info(self._devices.engine, self._devices.parts.graph.names.pool)

    def changes(self, layer: str, parent: str = "") -> "tuple[Change, ...]":
        self._check_have_directories(layer, parent)
        return tuple(self.driver.changes(layer, parent))

    def diff_size(self, layer: str, parent: str = "") -> int:
        self._check_have_directories(layer, parent)
        return self.driver.diff_size(layer, parent)

    @contextmanager
    def diff(self, layer: str, parent: str = "") -> Iterator[BinaryIO]:
        self._check_have_directories(layer, parent)
        with self.driver.diff(layer, parent) as stream:
            yield stream

    def apply(self, layer: str, parent: str, stream: BinaryIO, *, progress: Progress = None) -> int:
        self._check_have_directories(layer, parent)
        return self.driver.apply_diff(layer, parent, stream, progress=progress)

    def _require(self, layer: str) -> None:
        """`LayerNotFound` before anything is mounted."""
        if not self.driver.exists(layer):
            raise LayerNotFound(layer)

    def _ownership(self, layer: str) -> Ownership:
        record = self._store.load(LayerId(layer))
        return Ownership() if record is None else ownership_of(record)

    def _check_have_directories(self, layer: str, parent: str) -> None:
        for each in filter(None, (layer, parent)):
            self._require(each)
            self._check_has_directory(each)

    def _check_has_directory(self, layer: str) -> None:
        """Docker's layout would be made inside of a snapshot, and that may be committed."""
        belongs_to = self._ownership(layer)
        if belongs_to.is_snapshot:
            raise UsageError(
                f"layer {layer!r} belongs to {belongs_to}",
                hint="it is mounted by way of containerd: ctr snapshots mounts tells how",
            )

    def _remove_snapshot(self, layer: str, key: str) -> bool:
        """By way of the snapshots: they know which have children."""
        if not key:
            raise UsageError(
                f"layer {layer!r} is the root of all snapshots of containerd",
                hint="it takes next to no space, and they are made from it",
            )
        snapshots = self._snapshots
        if snapshots is None:
            from devmapper.snapshots import Snapshots

            snapshots = Snapshots(self._devices)
        snapshots.remove(key)
        return self._store.load(LayerId(layer)) is not None


def engine_info(engine: "Engine", pool_name: str) -> EngineInfo:
    """How *engine* is, and what it has active of the pool; nothing is started."""
    features = engine.features()
    pool = engine.find_pool(pool_name)
    devices = [] if pool is None else pool.devices()
    process, log = _process(pool_name) if features.name == "embedded" else (None, None)
    return EngineInfo(
        features.name,
        features.driver_version,
        pool_name,
        pool is not None,
        process if pool is not None else None,
        log,
        tuple(
            ActiveDevice(
                device.name,
                device.thin_id,
                device.size,
                str(device.path),
                str(device.state),
                device.open_count,
                None if device.nbd is None else _nbd_service(device.nbd),
            )
            for device in devices
        ),
    )


def _nbd_service(export: "NbdExport") -> NbdService:
    return NbdService(export.uri(), str(export.socket), export.read_only, export.clients)


def _process(pool: str) -> tuple[int | None, str]:
    from devmapper.engine.embedded import runtime

    paths = runtime.paths_of(pool)
    identity = runtime.read_pid(paths)
    return None if identity is None else identity.pid, str(paths.log)
