"""Threads of the daemon that die, noticed: half a daemon is worse than one that starts again.

A service stands on a thread of its own.  What that thread does not catch ends it, and its clients
would wait for ever, or be refused, while the others are served.
"""

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from devmapper.errors import ServiceDied

log = logging.getLogger(__name__)


class ThreadDeaths:
    """A context in which a thread that ends by an exception is logged, and the first remembered.

    Source: `threading.excepthook` of the standard library, which is the process's own.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        """*wake* is called in the thread that dies."""
        self._wake = wake
        self._guard = threading.Lock()
        self._first: ServiceDied | None = None

    @property
    def first(self) -> ServiceDied | None:
        """The first thread that has died, as an error."""
        with self._guard:
            return self._first

    def __enter__(self) -> Self:
        self._before = threading.excepthook
        threading.excepthook = self._notice
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        threading.excepthook = self._before

    def _notice(self, death: threading.ExceptHookArgs) -> None:
        name = death.thread.name if death.thread is not None else "?"
        error = death.exc_value or death.exc_type()
        log.critical("thread %r has died", name, exc_info=error)
        with self._guard:
            if self._first is None:
                self._first = ServiceDied(name, error)
        self._wake()
