"""Metrics of the embedded engine, with its process, FUSE and loop devices."""

import pytest

from devmapper.engine.embedded.client import EmbeddedEngine
from tests.conformance.metrics_suite import MetricsSuite


@pytest.mark.root
@pytest.mark.fuse
class TestMetricsOnEmbeddedEngine(MetricsSuite):
    def make_engine(self) -> EmbeddedEngine:
        return EmbeddedEngine()
