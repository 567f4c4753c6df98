"""What a graph looks like from outside: its pool now, its layers a moment ago.

Two measurements of different price.  The pool tells its state with a few messages.  What each layer
takes costs a copy of pool metadata and a walk through it, so that is asked for rarely.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from devmapper.deviceset.names import file_name
from devmapper.deviceset.owners import owner_of
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.status import Status
from devmapper.driver import Driver
from devmapper.engine.port import DeviceInfo
from devmapper.linux import blockdev, mount
from devmapper.server.sampling import Sample, Sampler
from devmapper.snapshots.model import Info
from devmapper.snapshots.record import NotASnapshot, decode
from devmapper.units import Bytes

NOBODY: Final = "-"  # owner of a layer that the command line, the Python API or Docker itself made
_STOP_SECONDS: Final = 5.0


class PoolReading(NamedTuple):
    """The pool at one moment."""

    status: Status
    low_water: Bytes  # free data at which the pool itself warns; 0 if it is never below that
    low_water_reached: bool
    active: int  # thin devices that have a block device


class LayerReading(NamedTuple):
    """One layer; sizes in bytes."""

    id: str
    owner: str
    snapshot: str  # containerd's key or name of it, "" for all other layers
    size: int
    mapped: int
    exclusive: int
    active: bool
    mounted: bool


class LayersReading(NamedTuple):
    """All layers at one moment, the base layer too; those that take most come first."""

    layers: tuple[LayerReading, ...]
    kinds: tuple[tuple[str, int], ...]  # containerd's snapshots by their kind


class SnapshotList(Protocol):
    """What is needed of `devmapper.snapshots.Snapshots`."""

    def walk(self) -> Iterator[Info]: ...


class Observer:
    """Measures one graph for whoever shows it.  Methods may be called from any thread."""

    def __init__(self, driver: Driver, snapshots: SnapshotList | None = None) -> None:
        self._driver = driver
        self._snapshots = snapshots
        self._pool = Sampler("pool", self._read_pool)
        self._layers = Sampler("layers", self._read_layers)

    @property
    def home(self) -> str:
        return str(self._driver.home)

    def pool(self, *, max_age: float = 1.0, patience: float = 2.0) -> Sample[PoolReading]:
        """See `Sampler.sample`."""
        return self._pool.sample(max_age=max_age, patience=patience)

    def layers(self, *, max_age: float = 60.0, patience: float = 1.0) -> Sample[LayersReading]:
        """See `Sampler.sample`."""
        return self._layers.sample(max_age=max_age, patience=patience)

    def stop(self) -> None:
        """Wait for what is being measured, but not for ever; the driver may be closed then."""
        self._pool.stop(_STOP_SECONDS)
        self._layers.stop(_STOP_SECONDS)

    def _read_pool(self) -> PoolReading:
        devices = self._driver.devices
        # Not `DeviceSet.status`, which has a value for a pool that is silent, too
        found = devices.ask(lambda pool: pool.status())
        pool = devices.pool
        mark = pool.table().low_water_mark
        # Docker's mark is 2 GiB whatever the pool's size: a small pool is always below it
        useful = mark < found.total_data_blocks
        return PoolReading(
            devices.status_of(found),
            Bytes(mark * found.block_size if useful else 0),
            found.low_water_reached and useful,
            len(pool.devices()),
        )

    def _read_layers(self) -> LayersReading:
        devices = self._driver.devices
        records = devices.parts.graph.store.load_all()
        usage = self._driver.usage(records)
        active = {info.thin_id: info for info in devices.pool.devices()}
        mounted = _mounted(list(active.values()))
        named = {file_name(layer): records[layer] for layer in records}
        found = [
            LayerReading(
                each.id,
                _owner(named.get(each.id)),
                _snapshot(named.get(each.id)),
                each.size,
                each.mapped,
                each.exclusive,
                each.thin_id in active,
                each.thin_id in mounted,
            )
            for each in usage
        ]
        found.sort(key=lambda each: (-each.exclusive, each.id))
        return LayersReading(tuple(found), self._count_kinds())

    def _count_kinds(self) -> tuple[tuple[str, int], ...]:
        if self._snapshots is None:
            return ()
        kinds: dict[str, int] = {}
        for info in self._snapshots.walk():
            kinds[info.kind] = kinds.get(info.kind, 0) + 1
        return tuple(sorted(kinds.items()))


def _owner(record: LayerRecord | None) -> str:
    return (owner_of(record) if record else "") or NOBODY


def _snapshot(record: LayerRecord | None) -> str:
    try:
        found = decode(record) if record else None
    except NotASnapshot:
        return ""  # whoever uses the snapshot is told
    return found.key if found else ""


def _mounted(active: Sequence[DeviceInfo]) -> set[int]:
    """The thin ids of devices that are mounted in this mount namespace."""
    if not active:
        return set()
    numbers = {entry.device for entry in mount.mountinfo()}
    found: set[int] = set()
    for info in active:
        try:
            if blockdev.device_number(info.path) in numbers:
                found.add(info.thin_id)
        except OSError:
            continue  # it went meanwhile
    return found
