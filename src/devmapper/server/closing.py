"""Ending an HTTP server so that no request is lost which a client has sent already.

A client that keeps its connection may send a request in the moment in which we close it.  It
cannot know what became of it: Docker's then sends it again without its body.  So at the end the
connections are looked into; one that holds a request is answered, and told that it was the last.
"""

import array
import asyncio
import fcntl
import select
import socket
import termios
from contextlib import suppress
from typing import Final

from aiohttp import web

_QUIET_SECONDS: Final = 0.5  # at most, that we wait for clients which send and send
_LOOK_SECONDS: Final = 0.001
_AGAIN_SECONDS: Final = 0.1


async def say_farewell(_request: web.Request, response: web.StreamResponse) -> None:
    """What an application that ends does with each response: no other request may follow it."""
    response.force_close()
    response.headers["Connection"] = "close"


async def quieten(server: web.Server, listener: socket.socket) -> None:
    """Let what clients have sent be read, then close all connections on which nothing happens.

    Nobody can connect any more, but for those who have done so and were not accepted yet.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _QUIET_SECONDS
    while _is_waiting(listener) or any(map(_has_unread, server.connections)):
        if loop.time() > deadline:  # a body that is longer than our buffers, or a busy client
            break
        await asyncio.sleep(_LOOK_SECONDS)
    server.pre_shutdown()


async def close_idle_again(server: web.Server) -> None:
    """Close connections that became idle, or were made, after the others; never ends."""
    while True:
        await asyncio.sleep(_AGAIN_SECONDS)
        server.pre_shutdown()


def _is_waiting(listener: socket.socket) -> bool:
    """Whether somebody has connected and was not accepted."""
    if listener.fileno() < 0:
        return False
    waiter = select.poll()
    waiter.register(listener, select.POLLIN)
    return bool(waiter.poll(0))


def _has_unread(connection: web.RequestHandler) -> bool:
    """Whether the kernel holds bytes that the client has sent (FIONREAD, unix(7), tcp(7))."""
    transport = connection.transport
    if transport is None or transport.is_closing():
        return False
    count = array.array("i", [0])
    with suppress(OSError, AttributeError):  # AttributeError: it has no socket any more
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
    return count[0] > 0
