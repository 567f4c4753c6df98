"""Our own commands' service: calls in JSON, tars in frames, errors in one form.

It decides nothing: `LocalGraph` does what a command would do that opens the graph itself.
"""

import asyncio
import io
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar, cast

from aiohttp import web

from devmapper.driver import Driver
from devmapper.errors import DevmapperError, UsageError
from devmapper.graph import calls, failures
from devmapper.graph.codec import Unfit, decode, encode
from devmapper.graph.frames import (
    PIECE,
    BrokenFrames,
    FramedTar,
    Kind,
    pack,
    pack_json,
    read_frame,
)
from devmapper.graph.local import LocalGraph
from devmapper.server.control.answers import Answer, answers, status_of
from devmapper.server.http import HttpService
from devmapper.server.observer import Observer
from devmapper.server.operations import Operations
from devmapper.server.overview import look, own_version, to_json
from devmapper.server.refusal import broken_body
from devmapper.server.service import STOP_SECONDS
from devmapper.server.streams import Intake, Outlet

if TYPE_CHECKING:
    from devmapper.snapshots import Snapshots

log = logging.getLogger(__name__)

NAME: Final = "control"
STREAMS: Final = 64  # tars at once; they have threads of their own, for a client may be slow
MAX_REQUEST: Final = 64 * 1024  # bytes of JSON
_FRAMES: Final = "application/vnd.devmapper.frames"

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlService(HttpService):
    """`Service`: the graph for `devmapper.graph.remote.RemoteGraph`."""

    def __init__(
        self,
        driver: Driver,
        snapshots: "Snapshots | None",
        operations: Operations,
        socket: Path,
        *,
        observer: Observer | None = None,
    ) -> None:
        """With *observer* what others have measured is shared; it is not stopped here then."""
        super().__init__(NAME, socket, self._application, refuse=_refuse)
        self._graph = LocalGraph(driver, snapshots)
        self._operations = operations
        self._observer = observer or Observer(driver, snapshots)
        self._own_observer = observer is None
        self._answers = answers()
        self._streams: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """See `Service.start`."""
        self._streams = ThreadPoolExecutor(STREAMS, thread_name_prefix=f"{NAME}-tar")
        super().start()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """See `Service.stop`."""
        super().stop(seconds)
        if self._streams is not None:
            self._streams.shutdown(wait=False, cancel_futures=True)
            self._streams = None
        if self._own_observer:
            self._observer.stop()

    def _application(self) -> web.Application:
        made = web.Application(client_max_size=MAX_REQUEST, middlewares=[_in_one_form])
        prefix = f"/{calls.VERSION}"
        made.router.add_post(f"{prefix}/{calls.DIFF}", self._diff)
        made.router.add_post(f"{prefix}/{calls.APPLY}", self._apply)
        made.router.add_post(f"{prefix}/{calls.HELLO}", self._hello)
        made.router.add_post(f"{prefix}/{calls.OVERVIEW}", self._overview)
        for name, answer in self._answers.items():
            made.router.add_post(f"{prefix}/{name}", self._handler(name, answer))
        return made

    def _handler(self, name: str, answer: Answer) -> Handler:
        async def handle(request: web.Request) -> web.Response:
            asked = decoded(answer.arguments, await request.read())
            with self._operations.measure(NAME, name):
                text = await self.in_thread(self._text_of, answer, asked)
            if name == calls.CREATE.name and _has_gone(request):
                await self.in_thread(self._take_back, asked)
            return web.Response(body=text, content_type="application/json")

        return handle

    def _text_of(self, answer: Answer, asked: object) -> bytes:
        return json.dumps(encode(answer.run(self._graph, asked))).encode()

    def _take_back(self, asked: calls.Creation) -> None:
        """A command that is interrupted while it makes a layer leaves none."""
        try:
            self._graph.remove(asked.layer)
        except (DevmapperError, OSError) as err:
            log.warning("layer %r, whose maker has gone, stays: %s", asked.layer, err)

    async def _hello(self, request: web.Request) -> web.Response:
        decoded(calls.Nothing, await request.read())
        return web.json_response({"pid": os.getpid(), "version": own_version()})

    async def _overview(self, request: web.Request) -> web.Response:
        decoded(calls.Nothing, await request.read())
        found = await self.in_thread(look, self._observer, self._operations)
        return web.json_response(to_json(found))

    async def _diff(self, request: web.Request) -> web.StreamResponse:
        asked = decoded(calls.Comparison, await request.read())
        response = web.StreamResponse(headers={"Content-Type": _FRAMES})

        async def send(frames: bytes) -> None:
            if not response.prepared:
                await response.prepare(request)
            await response.write(frames)

        outlet = Outlet(asyncio.get_running_loop(), send)
        try:
            with self._operations.measure(NAME, calls.DIFF):
                await self._in_stream_thread(lambda: self._write_diff(asked, outlet))
        except Exception as err:
            if not response.prepared:
                raise
            _mention(calls.DIFF, err)
            with suppress(ConnectionError):
                await send(outlet.rest() + pack_json(Kind.ERROR, failures.to_json(err)))
            return response
        await send(outlet.rest() + pack(Kind.END))
        return response

    def _write_diff(self, asked: calls.Comparison, out: Outlet) -> None:
        with self._graph.diff(asked.layer, asked.parent) as stream:
            while piece := stream.read(PIECE):
                out.write(pack(Kind.DATA, piece))

    async def _apply(self, request: web.Request) -> web.Response:
        # A producer may wait for ever with what it has sent, and that may be damaged
        intake = Intake(asyncio.get_running_loop(), request.content, b"", least=1)
        with self._operations.measure(NAME, calls.APPLY):
            size = await self._in_stream_thread(lambda: self._read_tar(intake))
        return web.json_response(encode(calls.Size(size)))

    def _read_tar(self, intake: Intake) -> int:
        body = cast("BinaryIO", io.BufferedReader(intake, PIECE))
        try:
            frame = read_frame(body)
            if frame.kind is not Kind.ARGUMENTS:
                raise BrokenFrames("no arguments before the tar")
        except BrokenFrames as err:
            raise UsageError(f"the request is no transfer: {err}") from err
        asked = decoded(calls.Comparison, frame.body)
        tar = cast("BinaryIO", io.BufferedReader(FramedTar(body), PIECE))
        return self._graph.apply(asked.layer, asked.parent, tar)

    async def _in_stream_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._streams, call)


def decoded(kind: type[T], body: bytes) -> T:
    """The arguments of a call; `UsageError` for anything else."""
    try:
        members = json.loads(body, object_pairs_hook=_members, parse_constant=_no_number)
    except (ValueError, RecursionError) as err:
        raise UsageError(f"the request is not JSON: {err}") from err
    if not isinstance(members, dict):
        raise UsageError("the request is not a JSON object")
    try:
        return decode(kind, members)
    except Unfit as err:
        raise UsageError(f"the request is wrong: {err}") from err


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member is given twice")
    return found


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is no number")


def _has_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


@web.middleware
async def _in_one_form(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong is an error in our own form."""
    try:
        return await handler(request)
    except web.HTTPException as err:
        return _reply(err.status, failures.to_json(_worded(request, err)), err.headers)
    except web.RequestPayloadError as err:
        return _refuse(HTTPStatus.BAD_REQUEST, broken_body(err))
    except Exception as err:  # noqa: BLE001 - the border of the protocol
        _mention(request.path, err)
        return _reply(status_of(err), failures.to_json(err))


def _worded(request: web.Request, err: web.HTTPException) -> UsageError:
    """aiohttp's own errors in our words."""
    match err.status:
        case HTTPStatus.NOT_FOUND:
            return UsageError(
                f"the daemon knows no call {request.path[:100]!r}",
                hint="command and daemon may be of different versions",
            )
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return UsageError(f"{request.path[:100]} takes POST, not {request.method[:20]}")
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return UsageError(f"the request has more than {MAX_REQUEST} bytes")
        case _:
            return UsageError(err.reason)


def _mention(what: str, error: BaseException) -> None:
    if isinstance(error, DevmapperError):
        log.debug("%s: %s", what, error)
    elif isinstance(error, ConnectionError):
        log.info("%s: %s", what, error)
    elif isinstance(error, OSError):
        log.warning("%s: %s", what, error)
    else:
        log.error("%s failed", what, exc_info=error)


def _refuse(status: HTTPStatus, sentence: str) -> web.Response:
    return _reply(status, failures.to_json(UsageError(sentence)))


def _reply(
    status: int, value: Mapping[str, object], headers: Mapping[str, str] | None = None
) -> web.Response:
    allow = {"Allow": headers["Allow"]} if headers and "Allow" in headers else None
    return web.json_response(value, status=status, headers=allow)
