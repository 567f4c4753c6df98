"""Metrics of the kernel's device mapper."""

import pytest

from devmapper.engine.kernel.engine import KernelEngine
from tests.conformance.metrics_suite import MetricsSuite


@pytest.mark.kernel
class TestMetricsOnKernelEngine(MetricsSuite):
    def make_engine(self) -> KernelEngine:
        return KernelEngine()
