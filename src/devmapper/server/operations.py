"""What the daemon does, counted: how often, how long, how many at once, and what failed.

The numbers are Prometheus' own kinds in a registry of their own, so that `/metrics` shows them as
they are and `devmapper top` reads the same.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_BUCKETS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
_LABELS: Final = ("front_end", "operation")


class Operations:
    """Requests of all front ends.  Methods may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._durations = Histogram(
            "devmapper_operation_duration_seconds",
            "How long requests took",
            _LABELS,
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._errors = Counter(
            "devmapper_operation_errors",
            "Requests that ended in an error, by its class",
            (*_LABELS, "error"),
            registry=self.registry,
        )
        self._under_way = Gauge(
            "devmapper_operations_under_way",
            "Requests that have begun and not ended",
            _LABELS,
            registry=self.registry,
        )

    @contextmanager
    def measure(self, front_end: str, operation: str) -> Iterator[None]:
        """Count one request; what it raises is counted by its class and goes on."""
        under_way = self._under_way.labels(front_end, operation)
        # Its 0 is there before the first request ends: one that never does is seen to be stuck
        durations = self._durations.labels(front_end, operation)
        under_way.inc()
        begin = time.perf_counter()
        try:
            yield
        except BaseException as err:
            self._errors.labels(front_end, operation, type(err).__name__).inc()
            raise
        finally:
            durations.observe(time.perf_counter() - begin)
            under_way.dec()

    @property
    def under_way(self) -> int:
        """How many requests have begun and not ended."""
        samples = (sample for metric in self._under_way.collect() for sample in metric.samples)
        return int(sum(sample.value for sample in samples))
