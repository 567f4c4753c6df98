"""What commands ask of a graph, and what they are told; the same from here and from the daemon.

Values only: they are also what travels between command and daemon (`devmapper.graph.calls`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple, Protocol

from devmapper.deviceset.consistency import Consistency
from devmapper.deviceset.id_maps import IdMap
from devmapper.deviceset.owners import Ownership
from devmapper.deviceset.status import DiskUsage
from devmapper.layerdiff.changes import Change

Progress = Callable[[int], None] | None  # gets the bytes just done


class LayerRow(NamedTuple):
    """One layer in a list; sizes in bytes."""

    id: str  # "base" for the base layer
    thin_id: int
    size: int
    mapped: int
    exclusive: int  # comes back when the layer is removed
    shared: int
    active: bool
    mounted: bool
    belongs_to: Ownership = Ownership()


class LayerDetails(NamedTuple):
    """All that is known about one layer."""

    row: LayerRow
    transaction_id: int
    initialized: bool
    device_name: str
    device_path: str | None  # of the block device, while it is active
    mount_point: str | None


class GraphInfo(NamedTuple):
    """The driver's state."""

    driver: str
    engine: str
    layers: int  # how many, without the base layer
    status: tuple[tuple[str, str], ...]  # the rows of `docker info`


class PoolInfo(NamedTuple):
    """How full the pool is; sizes in bytes."""

    name: str
    engine: str
    mode: str
    needs_check: bool
    transaction_id: int
    block_size: int
    data: DiskUsage
    metadata: DiskUsage
    data_file: str
    metadata_file: str
    data_file_allocated: int | None  # what a loop file takes on disk; None for a device


class NbdService(NamedTuple):
    """How a layer is served over NBD."""

    uri: str
    socket: str
    read_only: bool
    clients: tuple[str, ...] = ()  # in words


class ActiveDevice(NamedTuple):
    """One block device of the engine; *size* in bytes."""

    name: str
    thin_id: int
    size: int
    path: str
    state: str
    open_count: int
    nbd: NbdService | None = None


class EngineInfo(NamedTuple):
    """The engine and what it has active."""

    engine: str
    version: str
    pool: str
    running: bool
    process: int | None  # of the embedded engine, while it runs
    log: str | None
    devices: tuple[ActiveDevice, ...]


class IdMaps(NamedTuple):
    """The user namespace of the containers; without maps ids are the same inside and outside."""

    uid: tuple[IdMap, ...] = ()
    gid: tuple[IdMap, ...] = ()


class OpenGraph(Protocol):
    """A graph that somebody has opened.

    Errors are those of `devmapper.driver.Driver`, wherever the graph is.  A layer that belongs to
    containerd has no directory of its own (`UsageError`): who asked for the snapshot mounts it.
    """

    def create(self, layer: str, parent: str = "", *, size: int | None = None) -> None: ...
    def remove(self, layer: str, *, force: bool = False) -> bool:
        """Remove a layer; True if its deletion was put off until its last user is gone.

        `LayerNotFound`; without *force* `UsageError` for one that belongs to a front end.
        """

    def get(self, layer: str, label: str = "") -> str: ...
    def put(self, layer: str) -> None: ...
    def exists(self, layer: str) -> bool: ...
    def layers(self) -> tuple[LayerRow, ...]:
        """All layers, the base layer too, sorted."""

    def inspect(self, layer: str) -> LayerDetails: ...
    def info(self) -> GraphInfo: ...
    def pool(self) -> PoolInfo: ...
    def id_maps(self) -> IdMaps: ...
    def resize(self, size: int | None = None, *, metadata: int | None = None) -> PoolInfo:
        """Let the pool grow; `UsageError` if it is on loop files and no size is given."""

    def activate(self, layer: str) -> str:
        """The path of the layer's block device."""

    def deactivate(self, layer: str) -> bool: ...
    def serve_nbd(self, layer: str, socket: str = "", *, read_only: bool = False) -> NbdService: ...
    def stop_nbd(self, layer: str) -> bool:
        """Whether it was served."""

    def consistency(self) -> Consistency: ...
    def engine(self) -> EngineInfo: ...
    def changes(self, layer: str, parent: str = "") -> tuple[Change, ...]: ...
    def diff_size(self, layer: str, parent: str = "") -> int: ...
    def diff(self, layer: str, parent: str = "") -> AbstractContextManager[BinaryIO]:
        """The changes as a tar; what goes wrong amid it is raised when the context ends."""

    def apply(self, layer: str, parent: str, stream: BinaryIO, *, progress: Progress = None) -> int:
        """Unpack a tar of changes; returns the sum of the sizes in its headers."""
