"""The calls between a command and the daemon: `POST /v1/<name>`, an object each way.

`diff` answers with frames and `apply` asks with them (`devmapper.graph.frames`); everything else is
JSON.  What is added to a call later has a default, so that an older command and a newer daemon
understand each other; what changes gets another version.
"""

from typing import Final, Generic, NamedTuple, TypeVar

from devmapper.deviceset.consistency import Consistency
from devmapper.graph.model import (
    EngineInfo,
    GraphInfo,
    IdMaps,
    LayerDetails,
    LayerRow,
    NbdService,
    PoolInfo,
)
from devmapper.layerdiff.changes import Change

VERSION: Final = "v1"
DIFF: Final = "diff"
APPLY: Final = "apply"
HELLO: Final = "hello"  # takes `Nothing`, answers at once with an object
OVERVIEW: Final = "overview"  # takes `Nothing`, answers with `devmapper.server.overview`'s JSON

A = TypeVar("A")
R = TypeVar("R")


class Call(Generic[A, R]):
    """What a call is named, takes and returns."""

    __slots__ = ("arguments", "name", "result")

    def __init__(self, name: str, arguments: type[A], result: type[R]) -> None:
        self.name = name
        self.arguments = arguments
        self.result = result


class Nothing(NamedTuple):
    pass


class OneLayer(NamedTuple):
    layer: str


class Creation(NamedTuple):
    layer: str
    parent: str = ""
    size: int | None = None  # bytes


class Removal(NamedTuple):
    layer: str
    force: bool = False


class Removed(NamedTuple):
    put_off: bool


class Mounting(NamedTuple):
    layer: str
    label: str = ""


class Mounted(NamedTuple):
    path: str


class Existence(NamedTuple):
    exists: bool


class Listing(NamedTuple):
    layers: tuple[LayerRow, ...]


class Comparison(NamedTuple):
    """Of a layer with its parent; also what `diff` and `apply` take."""

    layer: str
    parent: str = ""


class Changes(NamedTuple):
    changes: tuple[Change, ...]


class Size(NamedTuple):
    size: int  # bytes


class Growth(NamedTuple):
    size: int | None = None  # bytes
    metadata: int | None = None


class Activated(NamedTuple):
    path: str


class Done(NamedTuple):
    done: bool  # False: there was nothing to do


class Serving(NamedTuple):
    layer: str
    socket: str = ""  # absolute; the engine chooses one
    read_only: bool = False


class Wishes(NamedTuple):
    """The options of a command line, for the daemon to compare with its own."""

    engine: str = "auto"
    storage_options: tuple[str, ...] = ()
    id_maps: tuple[str, ...] = ()


CREATE: Final = Call("create", Creation, Nothing)
REMOVE: Final = Call("remove", Removal, Removed)
GET: Final = Call("get", Mounting, Mounted)
PUT: Final = Call("put", OneLayer, Nothing)
EXISTS: Final = Call("exists", OneLayer, Existence)
LAYERS: Final = Call("layers", Nothing, Listing)
INSPECT: Final = Call("inspect", OneLayer, LayerDetails)
INFO: Final = Call("info", Nothing, GraphInfo)
POOL: Final = Call("pool", Nothing, PoolInfo)
ID_MAPS: Final = Call("id-maps", Nothing, IdMaps)
RESIZE: Final = Call("resize", Growth, PoolInfo)
ACTIVATE: Final = Call("activate", OneLayer, Activated)
DEACTIVATE: Final = Call("deactivate", OneLayer, Done)
SERVE_NBD: Final = Call("serve-nbd", Serving, NbdService)
STOP_NBD: Final = Call("stop-nbd", OneLayer, Done)
CONSISTENCY: Final = Call("consistency", Nothing, Consistency)
ENGINE: Final = Call("engine", Nothing, EngineInfo)
CHANGES: Final = Call("changes", Comparison, Changes)
DIFF_SIZE: Final = Call("diff-size", Comparison, Size)
AGREE: Final = Call("agree", Wishes, Nothing)
