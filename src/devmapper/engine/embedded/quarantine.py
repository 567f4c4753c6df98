"""Data blocks between the commit that freed them and their next use.

A block that became free may still be read or written by I/O that looked it up before.  Only when
that has ended, and never before the commit is durable, is the block punched out of the data device
and handed back to the allocator.  One thread does it, so that no commit waits for it.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from devmapper.engine.embedded.data_file import DataFile
from devmapper.thin.space_map import Run

log = logging.getLogger(__name__)

MAX_RUNS: Final = 65536  # that wait; a commit that frees more waits until they are fewer


class Quarantine:
    """Queue of freed runs and the thread that empties it."""

    def __init__(
        self,
        data: DataFile,
        block_size: int,
        *,
        wait_for_earlier_io: Callable[[], None],
        release: Callable[[Sequence[Run]], None],
    ) -> None:
        self.passdown = True
        self._data = data
        self._block_size = block_size
        self._wait_for_earlier_io = wait_for_earlier_io
        self._release = release
        self._queue: deque[Run] = deque()
        self._working = False
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pool-quarantine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, runs: Sequence[Run]) -> None:
        """Take runs that a durable commit has freed."""
        with self._changed:
            while len(self._queue) > MAX_RUNS and not self._stopping:
                self._changed.wait()
            self._queue.extend(runs)
            self._changed.notify_all()

    def is_empty(self) -> bool:
        return not self._queue and not self._working

    def drain(self) -> None:
        """Return when everything that was added before has been released."""
        with self._changed:
            while not self.is_empty() and self._thread.is_alive():
                self._changed.wait()

    def stop(self) -> None:
        """Drain and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if not self._queue:
                    return
                runs = list(self._queue)
                self._queue.clear()
                self._working = True
            try:
                self._wait_for_earlier_io()
                self._punch(runs)
                self._release(runs)
            except Exception:  # without the release the blocks stay unused until the pool is opened
                log.exception("freed data blocks could not be handed back")
            finally:
                with self._changed:
                    self._working = False
                    self._changed.notify_all()

    def _punch(self, runs: Sequence[Run]) -> None:
        if not self.passdown:
            return
        for begin, length in runs:
            try:
                self._data.punch(begin * self._block_size, length * self._block_size)
            except OSError as err:
                log.warning("punching data blocks %d+%d: %s", begin, length, err)
