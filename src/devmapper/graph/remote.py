"""A graph that the daemon holds, asked on its control socket.

Needs nothing but the standard library: a command shall start quickly.  One connection for each
call.  A call that was sent is never sent again: what it did is not known.
"""

import http.client
import io
import json
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar, cast

from devmapper.graph import calls, failures
from devmapper.graph.calls import Call
from devmapper.graph.codec import Unfit, decode, encode
from devmapper.graph.failures import DaemonError
from devmapper.graph.frames import PIECE, BrokenFrames, FramedTar, Kind, pack, pack_json

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from devmapper.deviceset.consistency import Consistency
    from devmapper.graph.model import (
        EngineInfo,
        GraphInfo,
        IdMaps,
        LayerDetails,
        LayerRow,
        NbdService,
        PoolInfo,
        Progress,
    )
    from devmapper.layerdiff.changes import Change

_CONNECT_SECONDS: Final = 5.0
_BREAK_OFF_SECONDS: Final = 30.0  # for the daemon to undo what a transfer was about
_PEER: Final = struct.Struct("3i")  # struct ucred: pid uid gid

A = TypeVar("A")
R = TypeVar("R")


class RemoteGraph:
    """Implements `OpenGraph`.  Methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        """*path* is the daemon's control socket; nothing is sent yet."""
        self._path = path

    def check_answers(self, seconds: float) -> None:
        """`OSError` if nobody listens, or whoever does says nothing within *seconds*."""
        with closing(http.client.HTTPConnection("localhost")) as connection:
            connection.sock = _connected(self._path)
            connection.sock.settimeout(seconds)
            try:
                connection.request("POST", _url(calls.HELLO), _dumps(calls.Nothing()))
                connection.getresponse().read()
            except http.client.HTTPException as err:
                raise ConnectionError(f"no answer in HTTP: {err}") from err

    def agree(
        self, engine: str, storage_options: tuple[str, ...], id_maps: tuple[str, ...]
    ) -> None:
        """`UsageError` if the daemon has the graph open with options that differ from these."""
        self._call(calls.AGREE, calls.Wishes(engine, storage_options, id_maps))

    def create(self, layer: str, parent: str = "", *, size: int | None = None) -> None:
        self._call(calls.CREATE, calls.Creation(layer, parent, size))

    def remove(self, layer: str, *, force: bool = False) -> bool:
        return self._call(calls.REMOVE, calls.Removal(layer, force)).put_off

    def get(self, layer: str, label: str = "") -> str:
        return self._call(calls.GET, calls.Mounting(layer, label)).path

    def put(self, layer: str) -> None:
        self._call(calls.PUT, calls.OneLayer(layer))

    def exists(self, layer: str) -> bool:
        return self._call(calls.EXISTS, calls.OneLayer(layer)).exists

    def layers(self) -> "tuple[LayerRow, ...]":
        return self._call(calls.LAYERS, calls.Nothing()).layers

    def inspect(self, layer: str) -> "LayerDetails":
        return self._call(calls.INSPECT, calls.OneLayer(layer))

    def info(self) -> "GraphInfo":
        return self._call(calls.INFO, calls.Nothing())

    def pool(self) -> "PoolInfo":
        return self._call(calls.POOL, calls.Nothing())

    def id_maps(self) -> "IdMaps":
        return self._call(calls.ID_MAPS, calls.Nothing())

    def resize(self, size: int | None = None, *, metadata: int | None = None) -> "PoolInfo":
        return self._call(calls.RESIZE, calls.Growth(size, metadata))

    def activate(self, layer: str) -> str:
        return self._call(calls.ACTIVATE, calls.OneLayer(layer)).path

    def deactivate(self, layer: str) -> bool:
        return self._call(calls.DEACTIVATE, calls.OneLayer(layer)).done

    def serve_nbd(self, layer: str, socket: str = "", *, read_only: bool = False) -> "NbdService":
        path = str(Path(socket).absolute()) if socket else ""
        return self._call(calls.SERVE_NBD, calls.Serving(layer, path, read_only))

    def stop_nbd(self, layer: str) -> bool:
        return self._call(calls.STOP_NBD, calls.OneLayer(layer)).done

    def consistency(self) -> "Consistency":
        return self._call(calls.CONSISTENCY, calls.Nothing())

    def engine(self) -> "EngineInfo":
        return self._call(calls.ENGINE, calls.Nothing())

    def changes(self, layer: str, parent: str = "") -> "tuple[Change, ...]":
        return self._call(calls.CHANGES, calls.Comparison(layer, parent)).changes

    def diff_size(self, layer: str, parent: str = "") -> int:
        return self._call(calls.DIFF_SIZE, calls.Comparison(layer, parent)).size

    @contextmanager
    def diff(self, layer: str, parent: str = "") -> Iterator[BinaryIO]:
        body = _dumps(calls.Comparison(layer, parent))
        with self._connection() as connection:
            with _wording():
                connection.request("POST", _url(calls.DIFF), body)
                response = _checked(connection.getresponse())
            tar = _RemoteTar(cast("BinaryIO", response), keep=True)
            yield cast("BinaryIO", io.BufferedReader(tar, PIECE))
            if tar.error is not None:
                raise tar.error

    def apply(
        self, layer: str, parent: str, stream: BinaryIO, *, progress: "Progress" = None
    ) -> int:
        with self._connection() as connection:
            with _wording():
                connection.putrequest("POST", _url(calls.APPLY))
                connection.putheader("Transfer-Encoding", "chunked")
                connection.endheaders()
            try:
                # It has answered and hears no more, or it is gone: the next read tells
                with suppress(BrokenPipeError, ConnectionResetError):
                    _send(connection, pack_json(Kind.ARGUMENTS, {"layer": layer, "parent": parent}))
                    _send_tar(connection, stream, progress)
            except BaseException:
                _break_off(connection)
                raise
            with _wording():
                return _result(connection.getresponse(), calls.Size).size

    def overview(self) -> dict[str, object]:
        """What `devmapper top` shows, for `devmapper.server.overview.from_json`."""
        with self._connection() as connection, _wording():
            connection.request("POST", _url(calls.OVERVIEW), _dumps(calls.Nothing()))
            return failures.loads(_checked(connection.getresponse()).read())

    def _call(self, call: Call[A, R], arguments: A) -> R:
        with self._connection() as connection, _wording():
            connection.request("POST", _url(call.name), _dumps(arguments))
            return _result(connection.getresponse(), call.result)

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        try:
            sock = _connected(self._path)
        except OSError as err:
            raise DaemonError(f"the daemon does not answer on {str(self._path)!r}: {err}") from err
        with closing(http.client.HTTPConnection("localhost")) as connection:
            connection.sock = sock
            yield connection


class _RemoteTar(FramedTar):
    """Only what goes wrong with the daemon is the daemon's: not what the reader does with it."""

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        with _wording():
            return super().readinto(buffer)


def _connected(path: Path) -> socket.socket:
    """A connection to a daemon of our own user or of root: others may have put a socket there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_CONNECT_SECONDS)
        sock.connect(str(path))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        _, uid, _ = _PEER.unpack(credentials)
        if uid not in (0, os.geteuid()):
            raise PermissionError(f"user {uid} listens there, who is not root")
        sock.settimeout(None)  # a call takes as long as it takes
    except BaseException:
        sock.close()
        raise
    return sock


def _url(name: str) -> str:
    return f"/{calls.VERSION}/{name}"


def _dumps(arguments: object) -> bytes:
    return json.dumps(encode(arguments)).encode()


@contextmanager
def _wording() -> Iterator[None]:
    """A connection that breaks is the daemon's end."""
    try:
        yield
    except (BrokenFrames, http.client.HTTPException, ConnectionError) as err:
        raise DaemonError(
            f"the daemon broke the request off ({str(err) or type(err).__name__})",
            hint="its log says why; what it was doing is undone or completed when it starts again",
        ) from err


def _checked(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    """The same, unless the daemon reports an error, which is raised."""
    if response.status == HTTPStatus.OK:
        return response
    raise failures.from_json(failures.loads(response.read()))


def _result(response: http.client.HTTPResponse, kind: type[R]) -> R:
    members = failures.loads(_checked(response).read())
    try:
        return decode(kind, members, strict=False)
    except Unfit as err:
        raise DaemonError(
            f"the daemon's answer is not understood: {err}", hint="is it of another version?"
        ) from err


def _send(connection: http.client.HTTPConnection, frame: bytes) -> None:
    """One frame is one chunk of the request's body."""
    connection.send(b"%x\r\n%b\r\n" % (len(frame), frame))


def _send_tar(
    connection: http.client.HTTPConnection, stream: BinaryIO, progress: "Progress"
) -> None:
    """Send *stream* until it ends, or the daemon answers: it may have found it damaged."""
    while not _answered(connection.sock, stream):
        piece = _piece(stream)
        if not piece:
            _send(connection, pack(Kind.END))
            connection.send(b"0\r\n\r\n")
            return
        _send(connection, pack(Kind.DATA, piece))
        if progress is not None:
            progress(len(piece))


def _piece(stream: BinaryIO) -> bytes:
    """What is there, without waiting for more: so that `_answered` sees what is to come."""
    read1 = getattr(stream, "read1", None)
    return cast("bytes", stream.read(PIECE) if read1 is None else read1(PIECE))


def _answered(sock: socket.socket, stream: BinaryIO) -> bool:
    """Wait for either side; True if the daemon has something to say."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    try:
        poll.register(stream.fileno(), select.POLLIN)
        milliseconds = None
    except OSError:  # not a file of the system's: there is always something to read
        milliseconds = 0
    return sock.fileno() in [fd for fd, _ in poll.poll(milliseconds)]


def _break_off(connection: http.client.HTTPConnection) -> None:
    """Tell the daemon that there is no more, and wait until it has let go of the layer."""
    told = failures.to_json(ConnectionAbortedError("the client broke the transfer off"))
    with suppress(OSError, http.client.HTTPException):
        connection.sock.settimeout(_BREAK_OFF_SECONDS)
        _send(connection, pack_json(Kind.ERROR, told))
        connection.send(b"0\r\n\r\n")
        connection.getresponse().read()
