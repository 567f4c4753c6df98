"""One connection to an HTTP server: what it was asked and has not answered, and how it ends.

A client that keeps its connection may send a request in the moment in which we close it, and cannot
know what became of it: Docker's then sends it again without its body.  So an end has two steps.
The first one lets the client send no more, at one moment for both sides (unix sockets; over TCP
nobody can).  What it has sent by then is answered before the second one, the close.
"""

import array
import asyncio
import fcntl
import logging
import socket
import termios
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from devmapper.server.refusal import Refuse, one_line

if TYPE_CHECKING:
    from aiohttp.streams import StreamReader

log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """One connection to an application; what cannot be parsed is refused, and ends it."""

    def __init__(
        self,
        server: web.Server,
        refuse: Refuse,
        *,
        loop: asyncio.AbstractEventLoop,
        keep_alive: float,
        changed: Callable[[], object],
    ) -> None:
        """*changed* is called whenever a request was answered, and when the connection is gone."""
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=keep_alive,
            access_log=None,  # type: ignore[arg-type]  # `AppRunner` takes it, too
        )
        self._refuse = refuse
        self._changed = changed
        self._answered = 0
        self._newest: StreamReader | None = None  # the body of the newest request
        self._takes_no_more = False

    @property
    def is_new(self) -> bool:
        """Whether nothing was asked so far."""
        return self._request_count == 0

    @property
    def is_asked(self) -> bool:
        """Whether a request has come in, if only its head, that is not answered."""
        return self._request_count > self._answered

    @property
    def has_unread(self) -> bool:
        """Whether the kernel holds bytes that the client has sent (FIONREAD, unix(7), tcp(7))."""
        if self.transport is None or self.transport.is_closing():
            return False
        count = array.array("i", [0])
        with suppress(OSError, AttributeError):  # AttributeError: it has no socket any more
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
        return count[0] > 0

    def end(self) -> None:
        """Take no more, and close; what the client has sent by now is answered before.

        Not for one that `is_asked`: the rest of that request would not come.
        """
        if self.transport is None:
            return
        peer = self.transport.get_extra_info("socket")
        if peer is not None and peer.family == socket.AF_UNIX:
            with suppress(OSError):  # the client has gone
                peer.shutdown(socket.SHUT_RD)  # he gets EPIPE from now on
                self._takes_no_more = True
        if not self.has_unread:
            self.close()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio's, which allows it
        """The end of what the client sends; True keeps the connection, for an answer.

        That is ours where it was `end` that has made it the end.
        """
        whole = self._newest is not None and self._newest.is_eof()
        return self._takes_no_more and self.is_asked and whole

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._changed()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send what is left of an answer; each request comes by here once."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._answered += 1
            if self._takes_no_more:
                self.close()
            self._changed()

    def data_received(self, data: bytes) -> None:
        """Take bytes; a request whose body goes wrong amid them learns of it.

        aiohttp forgets the body then, and who reads it would wait for as long as the client does.
        """
        before = self._request_count
        super().data_received(data)
        if self._request_count > before and self._messages:
            self._newest = self._messages[-1][1]
        error = getattr(self._messages[-1][0], "exc", None) if self._messages else None
        request = self._current_request
        if error is not None and request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError(one_line(error)))
            request.content.feed_eof()
            self.close()  # when it has been answered, and nothing else is

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what cannot be parsed, or to a handler that failed.

        `ConnectionError` where an answer has begun: the connection is broken off then.
        """
        if isinstance(exc, HttpProcessingError):
            sentence = f"the request is not HTTP: {one_line(exc)}"
            log.debug("%s", sentence)
        else:
            sentence = f"internal error: {type(exc).__name__}: {exc}"
            log.error("a request failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        response = self._refuse(HTTPStatus(status), sentence)
        response.force_close()
        return response
