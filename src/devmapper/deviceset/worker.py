"""A thread that does something every so often, until it is told to stop."""

import logging
import threading
from collections.abc import Callable

from devmapper.errors import DevmapperError

log = logging.getLogger(__name__)

Stopping = Callable[[], bool]


class Worker:
    """Calls *work* every *interval* seconds after `start`.

    *work* is given a function that tells whether it should come to an end.  What it raises is
    logged, and it is called again the next time.  Methods may be called from any thread, but not
    from *work*.
    """

    def __init__(self, name: str, work: Callable[[Stopping], object], *, interval: float) -> None:
        self._name = name
        self._work = work
        self._interval = interval
        self._stopping = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to wait for the next time; nothing to do if it runs already."""
        with self._guard:
            if self._thread is not None:
                return
            self._stopping.clear()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def abandon(self) -> None:
        """Let it end as soon as it can, without waiting for that."""
        self._stopping.set()

    def stop(self) -> None:
        """End it: a wait ends at once, work that is under way is waited for.  Idempotent."""
        with self._guard:
            self._stopping.set()
            if self._thread is not None:
                self._thread.join()
                self._thread = None

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            try:
                self._work(self._stopping.is_set)
            except (DevmapperError, OSError) as err:
                log.warning("%s: %s", self._name, err)
            except Exception:
                log.exception("%s", self._name)
