"""Asking what may not answer, without waiting for it: a pool that hangs keeps nobody.

A call that blocks runs in a thread of its own, one at a time.  Whoever asks gets the newest value
there is, waits for a newer one for a moment at most, and is told how old it is.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

from devmapper.errors import DevmapperError

log = logging.getLogger(__name__)

T = TypeVar("T")

_NOTHING_YET: Final = "it has not answered yet"


class Sample(NamedTuple, Generic[T]):
    """What is known; times are those of `time.monotonic`."""

    value: T | None  # the last answer, None if there was none yet
    taken: float  # when the measurement of *value* began
    seconds: float  # how long it took
    error: str  # why there is nothing newer, "" if *value* is what was asked for

    def age(self) -> float | None:
        """Seconds since *value* was true; None without one."""
        return None if self.value is None else time.monotonic() - self.taken


class Sampler(Generic[T]):
    """Calls *measure* when somebody asks, and not otherwise.  Any thread may ask.

    What *measure* raises becomes a part of the sample: nobody who asks sees an exception.
    """

    def __init__(self, name: str, measure: Callable[[], T]) -> None:
        self._name = name
        self._measure = measure
        self._changed = threading.Condition()
        self._sample: Sample[T] = Sample(None, 0.0, 0.0, _NOTHING_YET)
        self._asked: float | None = None  # when the measurement under way began
        self._tried = float("-inf")  # when the last one that has ended did
        self._thread: threading.Thread | None = None

    def sample(self, *, max_age: float, patience: float) -> Sample[T]:
        """A value that is at most *max_age* seconds old, or the last one and why it is older.

        It is waited for until *patience* seconds after its measurement began, so that of many who
        ask a pool that hangs only the first ones wait.
        """
        with self._changed:
            if self._asked is None:
                if self._tried > time.monotonic() - max_age:
                    return self._sample
                self._begin()
            begun = self._asked
            while self._asked is not None and self._asked == begun:
                left = self._asked + patience - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return self._late()
            return self._sample

    def stop(self, seconds: float) -> None:
        """Wait for a measurement under way, at most *seconds*: one that hangs is left alone."""
        with self._changed:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _late(self) -> Sample[T]:
        if self._asked is None:
            return self._sample
        waited = time.monotonic() - self._asked
        return self._sample._replace(error=f"it has not answered for {waited:.1f} s")

    def _begin(self) -> None:
        self._asked = time.monotonic()
        # A daemon: the process may end although the pool never answers
        self._thread = threading.Thread(
            target=self._run, args=(self._asked,), name=f"sample {self._name}", daemon=True
        )
        self._thread.start()

    def _run(self, begun: float) -> None:
        error = "the measurement ended with an unexpected error, see the log"
        value: T | None = None
        try:
            value = self._measure()
            error = ""
        except (DevmapperError, OSError, RuntimeError) as err:  # the last: the graph is closed
            error = " ".join(str(err).split()) or type(err).__name__
        except Exception:
            log.exception("measuring %s", self._name)
        finally:
            now = time.monotonic()
            with self._changed:
                if value is not None and not error:
                    self._sample = Sample(value, begun, now - begun, "")
                else:
                    self._sample = self._sample._replace(error=error)
                self._asked = None
                self._tried = now
                self._thread = None
                self._changed.notify_all()
