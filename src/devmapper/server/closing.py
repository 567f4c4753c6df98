"""Ending an HTTP server so that no request is lost which a client has sent already."""

import asyncio
import select
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Final

from devmapper.server.connection import Connection

_LOOK_SECONDS: Final = 0.001
# At most, for clients which send and send, or do not.  No limit in seconds: on a busy machine they
# may be over before the second look
_LOOKS: Final = 500
_UNREAD_SECONDS: Final = 0.05  # until the loop has read what nobody tells us of


async def quieten(
    connections: Callable[[], Collection[Connection]], listener: socket.socket | None
) -> None:
    """Let what clients have sent begin, then end the connections without a request.

    Nobody can connect to *listener* any more, but those are accepted who have done so; who has
    connected is about to send, and is waited for.
    """
    quiet = 0
    for _ in range(_LOOKS):
        is_quiet = not _is_waiting(listener) and not any(
            each.has_unread or each.is_new for each in connections() if not each.is_asked
        )
        quiet = quiet + 1 if is_quiet else 0
        if quiet == 2:  # who was accepted at the first look is a connection by the second
            break
        await asyncio.sleep(_LOOK_SECONDS)
    for connection in connections():
        if not connection.is_asked:
            connection.end()


async def answered(
    connections: Callable[[], Collection[Connection]], changed: asyncio.Event
) -> None:
    """Wait until there is nothing to answer; each connection that has done so sets *changed*."""
    while any(each.is_asked or each.has_unread for each in connections()):
        changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNREAD_SECONDS):
                await changed.wait()


def _is_waiting(listener: socket.socket | None) -> bool:
    """Whether somebody has connected and was not accepted."""
    if listener is None or listener.fileno() < 0:
        return False
    waiter = select.poll()
    waiter.register(listener, select.POLLIN)
    return bool(waiter.poll(0))
