"""Group commit: many flushes share one round of work, and one thread sees to it that none is late.

A round that is under way may have missed what its caller wrote, so a flush waits for one that
starts after it was called.  While a round runs, all that arrive join the next one.
"""

import errno
import logging
import threading
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

COMMIT_PERIOD: Final = 1.0  # seconds, COMMIT_PERIOD of the kernel's dm-thin.c


class _Round:
    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: Exception | None = None


class GroupCommit:
    """Runs *work* in rounds, one at a time, in the thread of one of those who wait for it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._running = False
        self._next = _Round()
        self.rounds = 0

    def run(self) -> None:
        """Return when a round that began after the call has ended; raise what it raised."""
        with self._changed:
            joined = self._next
            while self._running and not joined.done:
                self._changed.wait()
            if not joined.done:
                self._running = True
                self._next = _Round()
        if not joined.done:
            self._lead(joined)
        if joined.error is not None:
            raise joined.error

    def _lead(self, mine: _Round) -> None:
        try:
            self._work()
        except Exception as err:  # noqa: BLE001  # everybody who waits for the round gets it
            mine.error = err
        except BaseException:
            mine.error = InterruptedError(errno.EINTR, "commit was interrupted")
            raise
        finally:
            with self._changed:
                mine.done = True
                self._running = False
                self.rounds += 1
                self._changed.notify_all()


class PeriodicCommit:
    """A thread that commits a period after the first change, or sooner when it is told to."""

    def __init__(self, commits: GroupCommit, *, period: float = COMMIT_PERIOD) -> None:
        self._commits = commits
        self._period = period
        self._changed = threading.Event()
        self._hurry = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pool-commit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def note_change(self) -> None:
        """Something was changed that a commit has to make durable."""
        if not self._changed.is_set():
            self._changed.set()

    def hurry(self) -> None:
        """Commit now: somebody waits for what a commit gives back."""
        self._hurry.set()
        self._changed.set()

    def stop(self) -> None:
        """End the thread; the last commit is up to the caller."""
        self._stopping = True
        self.hurry()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._changed.wait()
            self._hurry.wait(self._period)
            if self._stopping:
                return
            self._hurry.clear()
            self._changed.clear()
            try:
                self._commits.run()
            except Exception:  # the pool's mode has changed; who flushes is told
                log.exception("periodic commit failed")
