"""What each call of `devmapper.graph.calls` does, and which HTTP status goes with which error."""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeVar

from devmapper.errors import (
    ArchiveError,
    DevmapperError,
    EngineError,
    EnvironmentLacking,
    LayerBusy,
    LayerExists,
    LayerNotFound,
    LayerNotMounted,
    PoolBusy,
    PoolFull,
    PoolNotFound,
    PoolUnusable,
    SnapshotStateError,
    ThinBusy,
    UsageError,
)
from devmapper.graph import calls
from devmapper.graph.calls import Call
from devmapper.graph.frames import BrokenFrames
from devmapper.graph.local import LocalGraph
from devmapper.server.control.agreement import check_agrees

A = TypeVar("A")
R = TypeVar("R")

_STATUSES: Final[tuple[tuple[type[DevmapperError], HTTPStatus], ...]] = (
    (UsageError, HTTPStatus.BAD_REQUEST),
    (LayerNotFound, HTTPStatus.NOT_FOUND),
    (PoolNotFound, HTTPStatus.NOT_FOUND),
    (LayerExists, HTTPStatus.CONFLICT),
    (LayerBusy, HTTPStatus.CONFLICT),
    (LayerNotMounted, HTTPStatus.CONFLICT),
    (SnapshotStateError, HTTPStatus.CONFLICT),
    (ThinBusy, HTTPStatus.CONFLICT),
    (PoolBusy, HTTPStatus.CONFLICT),
    (ArchiveError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (PoolFull, HTTPStatus.INSUFFICIENT_STORAGE),
    (PoolUnusable, HTTPStatus.SERVICE_UNAVAILABLE),
    (EnvironmentLacking, HTTPStatus.SERVICE_UNAVAILABLE),
    (EngineError, HTTPStatus.SERVICE_UNAVAILABLE),
)


class Answer(NamedTuple):
    """How one call is answered."""

    arguments: type[Any]
    run: Callable[[LocalGraph, Any], Any]


def status_of(error: BaseException) -> HTTPStatus:
    """The status that fits; 500 where the fault is neither the client's nor the pool's."""
    if isinstance(error, BrokenFrames):
        return HTTPStatus.BAD_REQUEST
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return HTTPStatus.INTERNAL_SERVER_ERROR


def answers() -> Mapping[str, Answer]:
    """Every call whose arguments and result are JSON, by its name."""
    return dict(
        (
            _answer(calls.CREATE, _create),
            _answer(
                calls.REMOVE,
                lambda graph, asked: calls.Removed(graph.remove(asked.layer, force=asked.force)),
            ),
            _answer(
                calls.GET, lambda graph, asked: calls.Mounted(graph.get(asked.layer, asked.label))
            ),
            _answer(calls.PUT, _put),
            _answer(calls.EXISTS, lambda graph, asked: calls.Existence(graph.exists(asked.layer))),
            _answer(calls.LAYERS, lambda graph, _: calls.Listing(graph.layers())),
            _answer(calls.INSPECT, lambda graph, asked: graph.inspect(asked.layer)),
            _answer(calls.INFO, lambda graph, _: graph.info()),
            _answer(calls.POOL, lambda graph, _: graph.pool()),
            _answer(calls.ID_MAPS, lambda graph, _: graph.id_maps()),
            _answer(
                calls.RESIZE,
                lambda graph, asked: graph.resize(asked.size, metadata=asked.metadata),
            ),
            _answer(
                calls.ACTIVATE, lambda graph, asked: calls.Activated(graph.activate(asked.layer))
            ),
            _answer(
                calls.DEACTIVATE, lambda graph, asked: calls.Done(graph.deactivate(asked.layer))
            ),
            _answer(
                calls.SERVE_NBD,
                lambda graph, asked: graph.serve_nbd(
                    asked.layer, asked.socket, read_only=asked.read_only
                ),
            ),
            _answer(calls.STOP_NBD, lambda graph, asked: calls.Done(graph.stop_nbd(asked.layer))),
            _answer(calls.CONSISTENCY, lambda graph, _: graph.consistency()),
            _answer(calls.ENGINE, lambda graph, _: graph.engine()),
            _answer(
                calls.CHANGES,
                lambda graph, asked: calls.Changes(graph.changes(asked.layer, asked.parent)),
            ),
            _answer(
                calls.DIFF_SIZE,
                lambda graph, asked: calls.Size(graph.diff_size(asked.layer, asked.parent)),
            ),
            _answer(calls.AGREE, _agree),
        )
    )


def _answer(call: Call[A, R], run: Callable[[LocalGraph, A], R]) -> tuple[str, Answer]:
    return call.name, Answer(call.arguments, run)


def _create(graph: LocalGraph, asked: calls.Creation) -> calls.Nothing:
    graph.create(asked.layer, asked.parent, size=asked.size)
    return calls.Nothing()


def _put(graph: LocalGraph, asked: calls.OneLayer) -> calls.Nothing:
    graph.put(asked.layer)
    return calls.Nothing()


def _agree(graph: LocalGraph, asked: calls.Wishes) -> calls.Nothing:
    check_agrees(graph.driver, asked)
    return calls.Nothing()
