"""Docker's graphdriver plugin as a service: routes, statuses, and which call runs in which thread.

A reply is 200 where the request was understood, with what went wrong in `Err`: so Docker shows it
as it is.  Other statuses are for requests that were not understood (4xx), for Diff, whose body is
not JSON, and for defects (500); their bodies have an `Err` as well.  Diff and Changes are sent
while they are made: an error amid them is a reply without its end.
"""

import asyncio
import io
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeVar, cast

from aiohttp import web

from devmapper.deviceset.leaving import let_go_of_abandoned
from devmapper.deviceset.owners import DOCKER
from devmapper.driver import Driver
from devmapper.errors import DevmapperError, UsageError
from devmapper.server.docker import wire
from devmapper.server.docker.calls import Calls, Reply
from devmapper.server.docker.wire import LayerRequest
from devmapper.server.docker.wording import is_expected, sentence
from devmapper.server.http import FOREVER_SECONDS, HttpService
from devmapper.server.operations import Operations
from devmapper.server.refusal import broken_body
from devmapper.server.service import STOP_SECONDS
from devmapper.server.streams import Intake, Outlet, next_piece

log = logging.getLogger(__name__)

NAME: Final = "docker"
STREAMS: Final = 64  # tars at once; they have threads of their own, for a client may be slow
_TAR: Final = "application/x-tar"
_NOT_UNDERSTOOD: Final = (UsageError, web.HTTPException, web.RequestPayloadError)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Endpoint(NamedTuple):
    """A request in JSON that is answered in JSON."""

    decode: Callable[[bytes], object]
    call: Callable[..., Reply]
    only_looks: bool = False  # at a small file at most: not worth a change of threads


class _Streamed(NamedTuple):
    """A request about a layer whose reply is sent while it is made."""

    call: Callable[[LayerRequest, BinaryIO], None]
    content_type: str = ""  # "": that of the other replies
    status_of_failure: HTTPStatus = HTTPStatus.OK


class DockerPlugin(HttpService):
    """`Service`: the graph as a storage driver of Docker."""

    def __init__(self, driver: Driver, socket: Path, operations: Operations) -> None:
        # Docker takes a connection that we close for a failure, and sends the request again
        # without its body: we close none
        super().__init__(NAME, socket, self._application, keep_alive=FOREVER_SECONDS, refuse=_reply)
        self._driver = driver
        self._operations = operations
        self._calls = Calls(driver)
        self._streams: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """See `Service.start`."""
        let_go_of_abandoned(self._driver.devices, DOCKER)
        self._streams = ThreadPoolExecutor(STREAMS, thread_name_prefix=f"{NAME}-tar")
        super().start()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """See `Service.stop`."""
        super().stop(seconds)
        if self._streams is not None:
            self._streams.shutdown(wait=False, cancel_futures=True)
            self._streams = None

    def _application(self) -> web.Application:
        made = web.Application(client_max_size=wire.MAX_REQUEST)
        for name, endpoint in self._endpoints().items():
            made.router.add_post(f"/{name}", self._handler(name, endpoint))
        for name, streamed in self._streamed().items():
            made.router.add_post(f"/{name}", self._stream_handler(name, streamed))
        made.router.add_post("/GraphDriver.ApplyDiff", self._apply_diff)
        made.router.add_route("*", "/{other:.*}", self._other)
        return made

    def _endpoints(self) -> dict[str, _Endpoint]:
        calls, nothing, layer = self._calls, wire.decode_nothing, wire.decode_layer
        return {
            "Plugin.Activate": _Endpoint(nothing, calls.activate, only_looks=True),
            "GraphDriver.Init": _Endpoint(wire.decode_init, calls.init),
            "GraphDriver.Capabilities": _Endpoint(nothing, calls.capabilities, only_looks=True),
            "GraphDriver.Create": _Endpoint(layer, calls.create),
            "GraphDriver.CreateReadWrite": _Endpoint(layer, calls.create),
            "GraphDriver.Remove": _Endpoint(layer, calls.remove),
            "GraphDriver.Get": _Endpoint(layer, calls.get),
            "GraphDriver.Put": _Endpoint(layer, calls.put),
            "GraphDriver.Exists": _Endpoint(layer, calls.exists, only_looks=True),
            "GraphDriver.Status": _Endpoint(nothing, calls.status),
            "GraphDriver.GetMetadata": _Endpoint(layer, calls.get_metadata, only_looks=True),
            "GraphDriver.Cleanup": _Endpoint(nothing, calls.cleanup),
            "GraphDriver.DiffSize": _Endpoint(layer, calls.diff_size),
        }

    def _streamed(self) -> dict[str, _Streamed]:
        failed = HTTPStatus.INTERNAL_SERVER_ERROR  # no JSON that could have an `Err`
        return {
            "GraphDriver.Changes": _Streamed(self._calls.changes),
            "GraphDriver.Diff": _Streamed(self._calls.diff, _TAR, failed),
        }

    def _handler(self, name: str, endpoint: _Endpoint) -> Handler:
        operation = name.partition(".")[2]
        decode, call, only_looks = endpoint

        async def handle(request: web.Request) -> web.Response:
            media_type = _media_type(request)
            if media_type is None:
                return _not_acceptable()
            try:
                asked = decode(await request.read())
            except _NOT_UNDERSTOOD as err:
                return _not_understood(err)
            try:
                with self._operations.measure(NAME, operation):
                    reply = call(asked) if only_looks else await self.in_thread(call, asked)
            except Exception as err:  # noqa: BLE001 - the border of the protocol
                return _failed(operation, err)
            return web.Response(body=wire.encode(reply), content_type=media_type)

        return handle

    async def _other(self, request: web.Request) -> web.Response:
        """What no endpoint has: another method, or another path."""
        name = request.path[1:]
        known = {*self._endpoints(), *self._streamed(), "GraphDriver.ApplyDiff"}
        if name in known:
            return _reply(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{name} takes POST, not {request.method[:20]}"
            )
        return _reply(HTTPStatus.NOT_FOUND, f"there is no endpoint {request.path[:100]!r}")

    def _stream_handler(self, name: str, streamed: _Streamed) -> Handler:
        operation = name.partition(".")[2]

        async def handle(request: web.Request) -> web.StreamResponse:
            media_type = _media_type(request)
            if media_type is None:
                return _not_acceptable()
            try:
                asked = wire.decode_layer(await request.read())
            except _NOT_UNDERSTOOD as err:
                return _not_understood(err)
            content_type = streamed.content_type or media_type
            response = web.StreamResponse(headers={"Content-Type": content_type})
            try:
                with self._operations.measure(NAME, operation):
                    return await self._send(
                        request, response, lambda out: streamed.call(asked, out)
                    )
            except Exception as err:  # noqa: BLE001 - the border of the protocol
                if not response.prepared:
                    return _failed(operation, err, streamed.status_of_failure)
                # The reply must not look whole: no last chunk follows
                _break_off(request, operation, err)
                return response

        return handle

    async def _send(
        self,
        request: web.Request,
        response: web.StreamResponse,
        write: Callable[[BinaryIO], None],
    ) -> web.StreamResponse:
        async def send(piece: bytes) -> None:
            if not response.prepared:
                await response.prepare(request)
            await response.write(piece)

        outlet = Outlet(asyncio.get_running_loop(), send)
        await self._in_stream_thread(
            lambda: write(cast("BinaryIO", outlet))  # the part that is used
        )
        rest = outlet.rest()
        if not response.prepared:
            return web.Response(
                body=rest, headers={"Content-Type": response.headers["Content-Type"]}
            )
        await response.write(rest)
        await response.write_eof()
        return response

    async def _apply_diff(self, request: web.Request) -> web.Response:
        media_type = _media_type(request)
        if media_type is None:
            return _not_acceptable()
        try:
            asked = wire.decode_transfer(request.query)
        except UsageError as err:
            return _not_understood(err)
        try:
            with self._operations.measure(NAME, "ApplyDiff"):
                first = await next_piece(request.content)
                intake = Intake(asyncio.get_running_loop(), request.content, first)
                reply = await self._in_stream_thread(
                    lambda: self._calls.apply_diff(asked, io.BufferedReader(intake))
                )
        except Exception as err:  # noqa: BLE001 - the border of the protocol
            return _failed("ApplyDiff", err)
        return web.Response(body=wire.encode(reply), content_type=media_type)

    async def _in_stream_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._streams, call)


def _media_type(request: web.Request) -> str | None:
    return wire.reply_type(request.headers.get("Accept", ""))


def _not_acceptable() -> web.Response:
    return _reply(HTTPStatus.NOT_ACCEPTABLE, f"no version of the protocol but {wire.NEWEST}")


def _not_understood(error: Exception) -> web.Response:
    if isinstance(error, web.HTTPException):  # aiohttp's own: the body is too large
        return _reply(error.status, f"the request has more than {wire.MAX_REQUEST} bytes")
    if isinstance(error, web.RequestPayloadError):
        return _reply(HTTPStatus.BAD_REQUEST, broken_body(error))
    return _reply(HTTPStatus.BAD_REQUEST, sentence(error))


def _failed(operation: str, error: Exception, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    if is_expected(error):
        level = logging.DEBUG if isinstance(error, DevmapperError) else logging.WARNING
        log.log(level, "%s: %s", operation, sentence(error))
        return _reply(status, sentence(error))
    log.error("%s failed", operation, exc_info=error)
    return _reply(HTTPStatus.INTERNAL_SERVER_ERROR, sentence(error))


def _break_off(request: web.Request, operation: str, error: Exception) -> None:
    log.warning("%s: the reply was broken off: %s", operation, sentence(error))
    if request.transport is not None:
        request.transport.abort()


def _reply(status: int, error: str) -> web.Response:
    return web.Response(status=status, body=wire.encode({"Err": error}), content_type=wire.NEWEST)
