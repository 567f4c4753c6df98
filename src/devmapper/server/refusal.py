"""Requests that are no HTTP, answered in the form of the service that got them.

aiohttp answers such a request itself, with a text that no client of ours expects, before any
handler or middleware sees it.
"""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

log = logging.getLogger(__name__)

_SHOWN: Final = 200  # characters of what the parser says, which quotes the client

Refuse = Callable[[HTTPStatus, str], web.Response]  # of a status and a sentence


def plain(status: HTTPStatus, sentence: str) -> web.Response:
    """For a service whose errors have no form."""
    return web.Response(status=status, text=f"{sentence}\n")


def broken_body(error: Exception) -> str:
    """The sentence for a body that could not be read to its end (`web.RequestPayloadError`)."""
    return f"the body of the request is broken: {_one_line(error)}"


class Connection(web.RequestHandler):
    """One connection to an application; what cannot be parsed is refused, and ends it."""

    def __init__(
        self,
        server: web.Server,
        refuse: Refuse,
        *,
        loop: asyncio.AbstractEventLoop,
        keep_alive: float,
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=keep_alive,
            access_log=None,  # type: ignore[arg-type]  # `AppRunner` takes it, too
        )
        self._refuse = refuse

    def data_received(self, data: bytes) -> None:
        """Take bytes; a request whose body goes wrong amid them learns of it.

        aiohttp forgets the body then, and who reads it would wait for as long as the client does.
        """
        super().data_received(data)
        error = getattr(self._messages[-1][0], "exc", None) if self._messages else None
        request = self._current_request
        if error is not None and request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError(_one_line(error)))
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
            sentence = f"the request is not HTTP: {_one_line(exc)}"
            log.debug("%s", sentence)
        else:
            sentence = f"internal error: {type(exc).__name__}: {exc}"
            log.error("a request failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        response = self._refuse(HTTPStatus(status), sentence)
        response.force_close()
        return response


def _one_line(error: Exception) -> str:
    text = str(getattr(error, "message", "") or error)
    return " ".join(text.split())[:_SHOWN] or type(error).__name__
