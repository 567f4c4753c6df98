"""Ending an HTTP server so that no request is lost which a client has sent already.

A client that keeps its connection may send a request in the moment in which we close it.  It
cannot know what became of it: Docker's then sends it again without its body.  So at the end the
connections are looked into; one that holds a request is answered, and closed then.  A client that
has just connected is given a moment to send its first one.
"""

import array
import asyncio
import fcntl
import select
import socket
import termios
from collections.abc import Collection, Container
from contextlib import suppress
from typing import Final

from aiohttp import web

_LOOK_SECONDS: Final = 0.001
# At most, for clients which send and send, or do not.  No limit in seconds: on a busy machine they
# may be over before the second look
_LOOKS: Final = 500


async def quieten(
    server: web.Server,
    listener: socket.socket | None,
    under_way: Collection[object],
    heard: Container[object],
) -> None:
    """Let what clients have sent begin, then close the connections without a request.

    *under_way* are the connections that have one now, *heard* the transports that have had one.
    Nobody can connect to *listener* any more, but those are accepted who have done so; who has
    connected is about to send, and is waited for.
    """
    quiet = 0
    for _ in range(_LOOKS):
        idle = [each for each in server.connections if each not in under_way]
        is_quiet = not _is_waiting(listener) and not any(
            _has_unread(each) or _is_new(each, heard) for each in idle
        )
        quiet = quiet + 1 if is_quiet else 0
        if quiet == 2:  # what had been read at the first look has begun by the second
            break
        await asyncio.sleep(_LOOK_SECONDS)
    for connection in server.connections:
        if connection not in under_way:
            connection.close()


def _is_waiting(listener: socket.socket | None) -> bool:
    """Whether somebody has connected and was not accepted."""
    if listener is None or listener.fileno() < 0:
        return False
    waiter = select.poll()
    waiter.register(listener, select.POLLIN)
    return bool(waiter.poll(0))


def _is_new(connection: web.RequestHandler, heard: Container[object]) -> bool:
    transport = connection.transport
    return transport is not None and not transport.is_closing() and transport not in heard


def _has_unread(connection: web.RequestHandler) -> bool:
    """Whether the kernel holds bytes that the client has sent (FIONREAD, unix(7), tcp(7))."""
    transport = connection.transport
    if transport is None or transport.is_closing():
        return False
    count = array.array("i", [0])
    with suppress(OSError, AttributeError):  # AttributeError: it has no socket any more
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
    return count[0] > 0
