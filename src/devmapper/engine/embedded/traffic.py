"""I/O under way on one thin device: counted, held back, waited for.

An operation enters before it looks a mapping up and leaves after its last access to the data
device.  Entering and leaving take no lock: `deque.append` and `pop` are atomic, and each side first
publishes its own state and then looks at the other's, so that no wake-up is lost.

Two counters, used in turn, make it possible to wait for the operations that began before a moment
without stopping new ones (as the kernel's SRCU does): one that has read `side` but not yet counted
itself looks its mapping up later than the moment, and the second turn waits for it anyway.
"""

import errno
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Traffic:
    """Gate and counters; `side` and `held` are read on the data path without a lock."""

    __slots__ = ("_changed", "_other", "_turning", "_watchers", "closed", "held", "side")

    def __init__(self) -> None:
        self.side: deque[None] = deque()
        self._other: deque[None] = deque()
        self.held = 0  # how many want that nothing enters
        self.closed = False
        self._watchers = 0
        self._changed = threading.Condition()
        self._turning = threading.Lock()

    def enter(self) -> deque[None]:
        """Count one operation in, waiting while the gate is closed; the result goes to `leave`.

        The fast path does the same in line and calls `readmit` only when it finds `held` set.
        """
        side = self.side
        side.append(None)
        return self.readmit(side) if self.held else side

    def readmit(self, side: deque[None]) -> deque[None]:
        """Step back from the closed gate, wait until it opens and enter anew; EIO if it never will.

        When this raises, the operation has left.
        """
        while self.held:
            self.leave(side)
            with self._changed:
                while self.held and not self.closed:
                    self._changed.wait()
            if self.closed:
                raise OSError(errno.EIO, "thin device is closed")
            side = self.side
            side.append(None)
        return side

    def leave(self, side: deque[None]) -> None:
        side.pop()
        if self._watchers:
            with self._changed:
                self._changed.notify_all()

    def hold(self) -> None:
        """Close the gate and wait until everything that is inside has left."""
        with self._changed:
            self.held += 1
            self._wait_until_empty(self.side, self._other)

    def let_go(self) -> None:
        """Undo one `hold`."""
        with self._changed:
            self.held -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Wait as `hold` does; from then on everything is refused, also what waits at the gate."""
        if self.closed:
            return
        self.hold()
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    @contextmanager
    def inside(self) -> Iterator[None]:
        side = self.enter()
        try:
            yield
        finally:
            self.leave(side)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Nothing is under way inside the block."""
        self.hold()
        try:
            yield
        finally:
            self.let_go()

    def wait_for_earlier(self) -> None:
        """Return when every operation that looked a mapping up before the call has left."""
        with self._turning:
            for _ in range(2):
                with self._changed:
                    before, self.side, self._other = self.side, self._other, self.side
                    self._wait_until_empty(before)

    def _wait_until_empty(self, *sides: deque[None]) -> None:
        self._watchers += 1
        try:
            while any(sides):
                self._changed.wait()
        finally:
            self._watchers -= 1
