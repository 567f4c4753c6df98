"""The graph driver on the kernel's device mapper."""

import pytest

from devmapper.engine.kernel.engine import KernelEngine
from tests.conformance.graphdriver_suite import GraphDriverSuite


@pytest.mark.kernel
class TestDriverOnKernelEngine(GraphDriverSuite):
    def make_engine(self) -> KernelEngine:
        return KernelEngine()
