"""The graph's lock: one writer at a time, among threads and among processes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from devmapper.errors import GraphLocked
from devmapper.linux.files import FileLock

LOCK_TIMEOUT_SECONDS: Final = 30.0


class GraphLock:
    """Held for milliseconds, except while a new graph gets its base layer.  Not re-entrant."""

    def __init__(self, home: Path, *, timeout: float = LOCK_TIMEOUT_SECONDS) -> None:
        self._home = home
        self._timeout = timeout
        self._threads = threading.Lock()
        self._file = FileLock(home / "lock")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold it, or raise `GraphLocked`, which names the holder, when the time is up."""
        deadline = time.monotonic() + self._timeout
        if not self._threads.acquire(timeout=self._timeout):
            raise GraphLocked(self._home, "another thread of this process")
        try:
            try:
                self._file.acquire(timeout=max(0.0, deadline - time.monotonic()))
            except BlockingIOError as err:
                raise GraphLocked(self._home, self._file.holder()) from err
            try:
                yield
            finally:
                self._file.release()
        finally:
            self._threads.release()
