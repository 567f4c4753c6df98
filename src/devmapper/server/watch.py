"""Looks at the pool every so often and says in the log what has changed, once.

A pool that runs full or fails does so under running containers, and nobody has called us then.
Each event is one line with what to do about it, and counts in `devmapper_pool_events_total`.
"""

import logging
from typing import Final

from prometheus_client import Counter

from devmapper.deviceset.worker import Stopping, Worker
from devmapper.errors import UsageError
from devmapper.server.conditions import WARNINGS, Condition, Remark, Thresholds, remarks
from devmapper.server.observer import Observer
from devmapper.server.operations import Operations

log = logging.getLogger(__name__)

INTERVAL_SECONDS: Final = 10.0
_RECOVERED: Final = "recovered"
_MODES: Final = frozenset(
    {Condition.FAILED, Condition.READ_ONLY, Condition.OUT_OF_DATA_SPACE}
)  # at most one of them
_OVER: Final = {
    Condition.SILENT: "tells its state again",
    Condition.FAILED: "has not failed any more",
    Condition.READ_ONLY: "takes writes again",
    Condition.NEEDS_CHECK: "needs no check any more",
    Condition.OUT_OF_DATA_SPACE: "has data space again",
    Condition.LOW_DATA: "has enough free data again",
    Condition.LOW_METADATA: "has enough free metadata again",
}


class PoolWatch:
    """Watches one pool from `start` to `stop`; the events are counted in *operations*' registry.

    Make one for each `Operations`.  `UsageError` for thresholds or an interval that are not fit.
    """

    def __init__(
        self,
        observer: Observer,
        operations: Operations,
        *,
        interval: float = INTERVAL_SECONDS,
        thresholds: Thresholds | None = None,
    ) -> None:
        if not interval > 0:
            raise UsageError(f"watch interval {interval} is not more than 0 seconds")
        self._observer = observer
        self._thresholds = thresholds or Thresholds()
        self._thresholds.check()
        self._present: frozenset[Condition] = frozenset()
        self._events = Counter(
            "devmapper_pool_events",
            "Changes of the pool's condition that the watch has logged",
            ("event",),
            registry=operations.registry,
        )
        for event in (*Condition, _RECOVERED):
            self._events.labels(event)  # a rate needs the 0 before the first 1
        self._worker = Worker("pool watch", self._work, interval=interval)

    @property
    def present(self) -> frozenset[Condition]:
        """What was wrong when it looked last."""
        return self._present

    def start(self) -> None:
        """Look at the pool, and again after every interval."""
        self.look()
        self._worker.start()

    def stop(self) -> None:
        """Stop looking.  Idempotent."""
        self._worker.stop()

    def look(self) -> list[Remark]:
        """Look at the pool now, log and count what is new; returns what is wrong with it."""
        sample = self._observer.pool()
        found = remarks(sample, self._thresholds, self._present)
        now = frozenset(remark.condition for remark in found)
        for remark in found:
            if remark.condition not in self._present:
                self._tell(remark)
        now |= _not_known_to_be_over(self._present, now)
        if sample.value is not None:
            self._tell_what_is_over(sample.value.status.pool_name, self._present - now, now)
        self._present = now
        return found

    def _work(self, _stopping: Stopping) -> None:
        self.look()

    def _tell(self, remark: Remark) -> None:
        level = logging.WARNING if remark.condition in WARNINGS else logging.ERROR
        log.log(level, "%s; %s", remark.sentence, remark.hint)
        self._events.labels(remark.condition).inc()

    def _tell_what_is_over(
        self, pool: str, over: frozenset[Condition], now: frozenset[Condition]
    ) -> None:
        for condition in Condition:
            # From one mode that takes no writes into another is no recovery
            if condition in over and not (condition in _MODES and now & _MODES):
                log.info("pool %s %s", pool, _OVER[condition])
        if over and not now:
            log.info("pool %s is well", pool)
            self._events.labels(_RECOVERED).inc()


def _not_known_to_be_over(
    before: frozenset[Condition], now: frozenset[Condition]
) -> frozenset[Condition]:
    """A pool that does not answer tells nothing, one that has failed does not tell its sizes."""
    if Condition.SILENT in now:
        return before
    return before & WARNINGS if Condition.FAILED in now else frozenset()
