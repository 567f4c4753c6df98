"""containerd's Snapshots service on a unix socket.

Each request runs in a thread of a pool.  One whose client has gone before its turn comes is not
begun; one that has begun is finished, as a local snapshotter finishes it: what nobody knows of is
removed by containerd's garbage collector.
"""

import errno
import logging
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from devmapper.errors import UsageError
from devmapper.server import sockets
from devmapper.server.containerd import messages
from devmapper.server.containerd.api import snapshots_pb2 as api
from devmapper.server.containerd.filters import compile_filters
from devmapper.server.containerd.translate import Status, translate
from devmapper.server.operations import Operations
from devmapper.server.service import STOP_SECONDS
from devmapper.snapshots import Info, Snapshots

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
T = TypeVar("T")

NAME: Final = "containerd"
SERVICE: Final = "containerd.services.snapshots.v1.Snapshots"
WORKERS: Final = 32
_REQUEST_LIMIT: Final = (
    4 << 20
)  # bytes of a message, gRPC's default; containerd's labels: 4 KiB each
_WAITING_LIMIT: Final = 32_768  # requests
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _REQUEST_LIMIT),
    ("grpc.so_reuseport", 0),
    # Beyond a thousand that wait for a thread gRPC would cancel some at random
    ("grpc.server.max_pending_requests", _WAITING_LIMIT),
    ("grpc.server.max_pending_requests_hard_limit", 2 * _WAITING_LIMIT),
)
_GONE: Final = Status(grpc.StatusCode.CANCELLED, "the client has gone")


class SnapshotsService:
    """Implements `Service`."""

    def __init__(self, snapshots: Snapshots, socket: Path, operations: Operations) -> None:
        self._snapshots = snapshots
        self._socket = socket
        self._operations = operations
        self._under_way = _UnderWay()
        self._server: grpc.Server | None = None
        self._workers: ThreadPoolExecutor | None = None
        self._own: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return NAME

    @property
    def address(self) -> Path:
        """See `Service.address`."""
        return self._socket

    def start(self) -> None:
        """See `Service.start`."""
        workers = ThreadPoolExecutor(WORKERS, thread_name_prefix=NAME)
        server = grpc.server(workers, options=_OPTIONS)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, self._handlers()),)
        )
        try:
            with sockets.publishing(self._socket) as place:
                _listen(server, place)
                server.start()
        except BaseException:
            server.stop(None)
            workers.shutdown(wait=False)
            raise
        self._own = sockets.identity(self._socket)
        self._server, self._workers = server, workers

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """See `Service.stop`."""
        server, workers = self._server, self._workers
        if server is None or workers is None:
            return
        self._server = self._workers = None
        end = time.monotonic() + seconds
        server.stop(seconds).wait()
        # A client that has left does not end its request: gRPC does not wait for those
        if not self._under_way.wait_for_none(max(0.0, end - time.monotonic())):
            log.warning("the %s service: requests under way were broken off", NAME)
        workers.shutdown(wait=False, cancel_futures=True)
        sockets.remove(self._socket, self._own)

    def _handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        unary = self._unary
        return {
            "Prepare": unary("Prepare", api.PrepareSnapshotRequest, self._prepare),
            "View": unary("View", api.ViewSnapshotRequest, self._view),
            "Mounts": unary("Mounts", api.MountsRequest, self._mounts),
            "Commit": unary("Commit", api.CommitSnapshotRequest, self._commit),
            "Remove": unary("Remove", api.RemoveSnapshotRequest, self._remove),
            "Stat": unary("Stat", api.StatSnapshotRequest, self._stat),
            "Update": unary("Update", api.UpdateSnapshotRequest, self._update),
            "List": grpc.unary_stream_rpc_method_handler(self._list),
            "Usage": unary("Usage", api.UsageRequest, self._usage),
            "Cleanup": unary("Cleanup", api.CleanupRequest, self._cleanup),
        }

    def _unary(
        self, operation: str, kind: type[M], call: Callable[[M], Message]
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """Requests and replies pass gRPC as bytes, so that what is damaged is answered here."""

        def handle(raw: bytes, context: grpc.ServicerContext) -> bytes:
            return self._answer(
                operation, lambda: call(messages.parsed(kind, raw)).SerializeToString(), context
            )

        return grpc.unary_unary_rpc_method_handler(handle)

    def _answer(self, operation: str, call: Callable[[], T], context: grpc.ServicerContext) -> T:
        """What *call* returns, as one request that is counted; its error becomes the status."""
        with self._under_way.one():
            if context.is_active():
                try:
                    with self._operations.measure(NAME, operation):
                        return call()
                except Exception as err:  # noqa: BLE001 - the border of the service
                    status = translate(err, operation)
            else:
                status = _GONE
        return _abort(context, status)

    def _prepare(self, request: api.PrepareSnapshotRequest) -> Message:
        mounts = self._snapshots.prepare(request.key, request.parent, dict(request.labels))
        return api.PrepareSnapshotResponse(mounts=messages.mount_messages(mounts))

    def _view(self, request: api.ViewSnapshotRequest) -> Message:
        mounts = self._snapshots.view(request.key, request.parent, dict(request.labels))
        return api.ViewSnapshotResponse(mounts=messages.mount_messages(mounts))

    def _mounts(self, request: api.MountsRequest) -> Message:
        mounts = self._snapshots.mounts(request.key)
        return api.MountsResponse(mounts=messages.mount_messages(mounts))

    def _commit(self, request: api.CommitSnapshotRequest) -> Message:
        if request.parent and self._snapshots.stat(request.key).parent != request.parent:
            raise UsageError(
                f"snapshot {request.key!r} cannot be committed on another parent: blocks of a thin"
                " device cannot be moved to another origin",
                hint="the capability 'rebase' is not for this snapshotter",
            )
        self._snapshots.commit(request.name, request.key, dict(request.labels))
        return Empty()

    def _remove(self, request: api.RemoveSnapshotRequest) -> Message:
        self._snapshots.remove(request.key)
        return Empty()

    def _stat(self, request: api.StatSnapshotRequest) -> Message:
        found = self._snapshots.stat(request.key)
        return api.StatSnapshotResponse(info=messages.info_message(found))

    def _update(self, request: api.UpdateSnapshotRequest) -> Message:
        wanted = request.info
        found = self._snapshots.update(
            wanted.name, dict(wanted.labels), tuple(request.update_mask.paths)
        )
        return api.UpdateSnapshotResponse(info=messages.info_message(found))

    def _list(self, raw: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        def found() -> list[Info]:
            request = messages.parsed(api.ListSnapshotsRequest, raw)
            wanted = compile_filters(request.filters)
            return [info for info in self._snapshots.walk() if wanted(info)]

        for message in messages.list_messages(self._answer("List", found, context)):
            yield message.SerializeToString()

    def _usage(self, request: api.UsageRequest) -> Message:
        found = self._snapshots.usage(request.key)
        return api.UsageResponse(size=found.size, inodes=found.inodes)

    def _cleanup(self, _request: api.CleanupRequest) -> Message:
        self._snapshots.cleanup()
        return Empty()


class _UnderWay:
    """How many requests are under way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._changed:
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def wait_for_none(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, seconds)


def _abort(context: grpc.ServicerContext, status: Status) -> NoReturn:
    context.abort(status.code, status.text)


def _listen(server: grpc.Server, place: Path) -> None:
    """`OSError` where gRPC cannot listen; it says no errno."""
    address = f"unix:{urllib.parse.quote(os.fsencode(place))}"
    try:
        listening = server.add_insecure_port(address) != 0
    except RuntimeError as err:
        raise OSError(errno.EADDRNOTAVAIL, f"gRPC cannot listen: {err}", str(place)) from err
    if not listening:
        raise OSError(errno.EADDRNOTAVAIL, "gRPC cannot listen", str(place))
