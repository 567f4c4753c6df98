"""Tars between threads and the event loop: what becomes of a thread when the loop ends."""

import asyncio
import gc
import threading
from typing import Any

import pytest

from devmapper.server.streams import PIECE, Outlet


def test_a_piece_that_the_loop_never_begins_with_is_a_broken_connection(monkeypatch):
    loop = asyncio.new_event_loop()
    asked = threading.Event()
    call_soon = loop.call_soon_threadsafe

    def noticed(*args: Any, **kwargs: Any) -> asyncio.Handle:
        handle = call_soon(*args, **kwargs)
        asked.set()
        return handle

    monkeypatch.setattr(loop, "call_soon_threadsafe", noticed)

    async def send(_piece: bytes) -> None:
        raise AssertionError

    failures: list[BaseException] = []

    def write() -> None:
        with pytest.raises(ConnectionAbortedError) as raised:
            Outlet(loop, send).write(bytes(PIECE))
        failures.append(raised.value)

    thread = threading.Thread(target=write)
    thread.start()
    assert asked.wait(30)
    loop.close()
    thread.join(30)
    assert len(failures) == 1
    gc.collect()  # a coroutine that was never awaited is a warning here, which is an error
