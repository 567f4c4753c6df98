"""HTTP/1.1 on a unix socket or a TCP port: an aiohttp application in a thread of its own.

The core blocks, so requests run in worker threads; the event loop only moves bytes.
"""

import asyncio
import functools
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, ParamSpec, TypeVar, cast

from aiohttp import web

from devmapper.server import closing, sockets
from devmapper.server.address import Address, TcpAddress
from devmapper.server.connection import Connection
from devmapper.server.refusal import Refuse, plain
from devmapper.server.service import STOP_SECONDS

log = logging.getLogger(__name__)

__all__ = ["HttpService", "TcpAddress"]

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

WORKERS: Final = 32
_START_SECONDS: Final = 30.0
KEEP_ALIVE_SECONDS: Final = 75.0
FOREVER_SECONDS: Final = 30 * 86_400.0


class HttpService:
    """One application on one address; a subclass or caller gives it its routes."""

    def __init__(
        self,
        name: str,
        address: Path | TcpAddress,
        application: Callable[[], web.Application],
        *,
        keep_alive: float = KEEP_ALIVE_SECONDS,
        refuse: Refuse = plain,
    ) -> None:
        """*application* is called in the event loop's thread, once, by `start`.

        Connections that are idle for *keep_alive* seconds are closed.  *refuse* makes the answer
        to what is no HTTP.
        """
        self._refuse = refuse
        self._name = name
        self._address = address
        self._make = application
        self._workers: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._keep_alive = keep_alive
        self._grace = STOP_SECONDS
        self._changed = asyncio.Event()
        self._deadline: asyncio.Timeout | None = None  # while it stops
        self._own: tuple[int, int] | None = None
        self.port = 0  # of a TCP address, once it listens

    @property
    def name(self) -> str:
        return self._name

    @property
    def address(self) -> Address:
        """See `Service.address`."""
        if isinstance(self._address, TcpAddress):
            return self._address._replace(port=self.port or self._address.port)
        return self._address

    def start(self) -> None:
        """See `Service.start`."""
        listener = self._listen()
        ready: threading.Event = threading.Event()
        failures: list[BaseException] = []
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix=self._name)
        self._thread = threading.Thread(
            target=self._run, args=(listener, ready, failures), name=f"{self._name}-http"
        )
        self._thread.start()
        ready.wait(_START_SECONDS)
        if failures:
            self.stop(0.0)
            raise failures[0]

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """See `Service.stop`."""
        thread, loop, stop = self._thread, self._loop, self._stop
        if thread is None:
            return
        self._grace = min(self._grace, seconds) if self._deadline else seconds
        if loop is not None and stop is not None and thread.is_alive():
            with suppress(RuntimeError):  # the loop has ended just now
                loop.call_soon_threadsafe(stop.set)
                loop.call_soon_threadsafe(self._shorten)
        thread.join()
        self._thread = None
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)
        if isinstance(self._address, Path):
            sockets.remove(self._address, self._own)

    async def in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that blocks in a worker thread; for handlers."""
        assert self._workers is not None  # noqa: S101 - handlers run between start and stop
        bound = functools.partial(call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._workers, bound)

    @web.middleware
    async def _last(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Once it was told to stop, an answer is a connection's last."""
        response = await handler(request)
        if self._stop is not None and self._stop.is_set():
            response.force_close()
        return response

    async def _end(
        self,
        server: web.Server,
        runner: web.AppRunner,
        site: asyncio.Server,
        listener: socket.socket,
    ) -> None:
        """Let nobody connect any more, answer what clients have sent, and close.

        `AppRunner.cleanup` waits too, but a connection that it is about to close takes no data any
        more: the rest of a tar would never come.
        """
        if isinstance(self._address, Path):
            sockets.remove(self._address, self._own)

        def connections() -> list[Connection]:
            return cast("list[Connection]", server.connections)  # `_serve` makes no others

        await closing.quieten(connections, listener)
        site.close()
        await closing.answered(connections, self._changed)
        await closing.quieten(connections, None)  # whose last answer had begun before all this
        await runner.cleanup()

    def _shorten(self) -> None:
        """Give requests under way less time: it was told to stop again, with fewer seconds."""
        if self._deadline is None:
            return
        when = asyncio.get_running_loop().time() + self._grace
        before = self._deadline.when()
        if before is not None and when < before:
            self._deadline.reschedule(when)

    def _listen(self) -> socket.socket:
        if isinstance(self._address, Path):
            listener = sockets.listen(self._address)
            self._own = sockets.identity(self._address)
            return listener
        listener = socket.create_server(self._address, backlog=128)
        self.port = listener.getsockname()[1]
        return listener

    def _run(
        self, listener: socket.socket, ready: threading.Event, failures: list[BaseException]
    ) -> None:
        try:
            asyncio.run(self._serve(listener, ready))
        except BaseException as err:
            if ready.is_set():
                raise  # the thread dies of it, which the daemon notices
            failures.append(err)
        finally:
            listener.close()
            ready.set()

    async def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        application = self._make()
        application.middlewares.insert(0, self._last)
        runner = web.AppRunner(application, handle_signals=False, shutdown_timeout=FOREVER_SECONDS)
        await runner.setup()
        server = runner.server
        assert server is not None  # noqa: S101 - it has been set up
        connection = functools.partial(
            Connection,
            server,
            self._refuse,
            loop=self._loop,
            keep_alive=self._keep_alive,
            changed=self._changed.set,
        )
        site = await self._loop.create_server(connection, sock=listener, backlog=sockets.BACKLOG)
        try:
            ready.set()
            await self._stop.wait()
        finally:
            try:
                async with asyncio.timeout(self._grace) as self._deadline:
                    await self._end(server, runner, site, listener)
            except TimeoutError:
                log.warning("the %s service: requests under way were broken off", self._name)
                for each in server.connections:
                    if each.transport is not None:
                        each.transport.abort()
                await asyncio.sleep(0)  # for the loop to close them
