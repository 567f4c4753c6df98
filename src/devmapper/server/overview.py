"""One look at everything: the pool, its layers, the requests.  What `devmapper top` shows.

The daemon makes it and sends it as JSON, or the command makes it itself where no daemon runs.
"""

import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final, NamedTuple

from devmapper.engine.embedded import protocol
from devmapper.server.conditions import Remark, Thresholds, remarks
from devmapper.server.observer import LayerReading, Observer, PoolReading

if TYPE_CHECKING:
    from prometheus_client.samples import Sample as Series

    from devmapper.server.operations import Operations

_DURATIONS: Final = "devmapper_operation_duration_seconds"
_ERRORS: Final = "devmapper_operation_errors"
_UNDER_WAY: Final = "devmapper_operations_under_way"
_LAYERS_MAX_AGE: Final = 5.0


class OperationCounts(NamedTuple):
    """What a daemon has done of one kind since it started."""

    front_end: str
    operation: str
    ended: int
    seconds: float
    errors: int
    under_way: int
    buckets: tuple["Bucket", ...]


class Bucket(NamedTuple):
    """How many took at most *limit* seconds; those that took longer have none."""

    limit: float
    within: int


class Overview(NamedTuple):
    """The graph at one moment."""

    version: str
    taken: float  # seconds since 1970
    home: str
    pool: PoolReading | None
    pool_age: float  # seconds; of what is told of the pool
    layers: tuple[LayerReading, ...]
    layers_error: str  # why they are not newer, "" if all is well
    remarks: tuple[Remark, ...]
    served: bool  # whether a daemon tells it: without one there are no operations
    operations: tuple[OperationCounts, ...]


def look(
    observer: Observer,
    operations: "Operations | None" = None,
    *,
    thresholds: Thresholds | None = None,
    layers_max_age: float = _LAYERS_MAX_AGE,
) -> Overview:
    """Look at a graph; a pool that does not answer keeps nobody, see `Observer`."""
    pool = observer.pool()
    layers = observer.layers(max_age=layers_max_age, patience=2.0)
    return Overview(
        own_version(),
        time.time(),
        observer.home,
        pool.value,
        pool.age() or 0.0,
        layers.value.layers if layers.value else (),
        layers.error,
        tuple(remarks(pool, thresholds or Thresholds())),
        operations is not None,
        () if operations is None else _operations(operations),
    )


def to_json(overview: Overview) -> object:
    """As objects and lists for `json.dumps`."""
    return protocol.pack(overview)


def from_json(value: object) -> Overview:
    """What `to_json` has spelled; `EngineError` names what is missing or has another type."""
    return protocol.unpack(Overview, value)


def _operations(operations: "Operations") -> tuple[OperationCounts, ...]:
    found: dict[tuple[str, str], OperationCounts] = {}
    for family in operations.registry.collect():
        for series in family.samples:
            labels = series.labels
            if "front_end" not in labels:
                continue
            key = labels["front_end"], labels["operation"]
            so_far = found.get(key, OperationCounts(*key, 0, 0.0, 0, 0, ()))
            found[key] = _with(so_far, series, labels)
    return tuple(sorted(found.values()))


def _with(so_far: OperationCounts, series: "Series", labels: Mapping[str, str]) -> OperationCounts:
    match series.name.removeprefix(f"{_DURATIONS}"):
        case "_count":
            return so_far._replace(ended=int(series.value))
        case "_sum":
            return so_far._replace(seconds=float(series.value))
        case "_bucket" if labels["le"] != "+Inf":  # which JSON cannot spell, and *ended* tells
            bucket = Bucket(float(labels["le"]), int(series.value))
            return so_far._replace(buckets=(*so_far.buckets, bucket))
        case name if name == f"{_ERRORS}_total":
            return so_far._replace(errors=so_far.errors + int(series.value))
        case name if name == _UNDER_WAY:
            return so_far._replace(under_way=int(series.value))
        case _:
            return so_far


def own_version() -> str:
    """The version of this package."""
    try:
        return version("devmapper")
    except PackageNotFoundError:
        return "unknown"
