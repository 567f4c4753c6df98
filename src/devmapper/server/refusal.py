"""Requests that are no HTTP, answered in the form of the service that got them.

aiohttp answers such a request itself, with a text that no client of ours expects, before any
handler or middleware sees it.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from aiohttp import web

_SHOWN: Final = 200  # characters of what the parser says, which quotes the client

Refuse = Callable[[HTTPStatus, str], web.Response]  # of a status and a sentence


def plain(status: HTTPStatus, sentence: str) -> web.Response:
    """For a service whose errors have no form."""
    return web.Response(status=status, text=f"{sentence}\n")


def broken_body(error: Exception) -> str:
    """The sentence for a body that could not be read to its end (`web.RequestPayloadError`)."""
    return f"the body of the request is broken: {one_line(error)}"


def one_line(error: Exception) -> str:
    """What an error says, for a sentence."""
    text = str(getattr(error, "message", "") or error)
    return " ".join(text.split())[:_SHOWN] or type(error).__name__
