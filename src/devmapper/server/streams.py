"""Tars between the event loop and threads that block, in constant memory and with back-pressure.

A thread that is faster than the client waits for it, and the other way round.  Small tars pass in
one piece, for each piece costs two changes of threads.
"""

import asyncio
import concurrent.futures
import io
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiohttp import ClientError, StreamReader
from aiohttp.web import RequestPayloadError

from devmapper.errors import ArchiveError
from devmapper.server.refusal import broken_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from _typeshed import ReadableBuffer, WriteableBuffer

PIECE: Final = 256 * 1024
_LOOK_SECONDS: Final = 1.0  # how often a thread that waits asks whether there is a loop at all

T = TypeVar("T")


class Outlet(io.RawIOBase):
    """What a thread writes to: whole pieces go to *send* in the event loop, the rest stays."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, send: "Callable[[bytes], Awaitable[None]]"
    ) -> None:
        super().__init__()
        self._loop = loop
        self._send = send
        self._pending = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        """`OSError` (a `ConnectionError`) once the client has gone."""
        view = memoryview(data)
        self._pending += view
        if len(self._pending) >= PIECE:
            _wait_for(self._loop, self._pass_on(self.rest()))
        return view.nbytes

    def rest(self) -> bytes:
        """What was not sent yet."""
        data = bytes(self._pending)
        self._pending.clear()
        return data

    async def _pass_on(self, data: bytes) -> None:
        await self._send(data)


class Intake(io.RawIOBase):
    """What a thread reads from: the body of a request, whose *first* bytes were read already.

    It waits for PIECE bytes at a time, or only for the *least* that the thread can begin with.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        content: StreamReader,
        first: bytes,
        *,
        least: int = PIECE,
    ) -> None:
        super().__init__()
        self._least = least
        self._loop = loop
        self._content = content
        self._piece = memoryview(first)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """`ConnectionError` for a body that ends before its end."""
        if not self._piece:
            self._piece = memoryview(_wait_for(self._loop, next_piece(self._content, self._least)))
        target = memoryview(buffer)
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


async def next_piece(content: StreamReader, least: int = PIECE) -> bytes:
    """The next bytes of a body, at least that many unless it ends; none at its end."""
    found = bytearray()
    try:
        while len(found) < least:
            data = await content.readany()
            if not data:
                break
            found += data
    except ClientError as err:
        raise ConnectionResetError("the client broke the request off") from err
    except RequestPayloadError as err:
        raise ArchiveError("", broken_body(err)) from err
    return bytes(found)


def _wait_for(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Let the event loop do *work*, and wait; `ConnectionError` if the loop ends."""
    try:
        future = asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError:  # closed
        work.close()
        raise ConnectionAbortedError("the service ends") from None
    while True:
        try:
            return future.result(_LOOK_SECONDS)
        except concurrent.futures.CancelledError:
            raise ConnectionAbortedError("the service ends") from None
        except TimeoutError:
            if future.done():
                raise  # the work's own
            if loop.is_closed():
                work.close()  # it may have ended before it began with that
                raise ConnectionAbortedError("the service ends") from None
