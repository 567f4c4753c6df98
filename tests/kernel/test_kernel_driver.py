"""The graph driver on the kernel's device mapper."""

from pathlib import Path

import pytest

import devmapper
from devmapper.driver import Driver
from devmapper.engine.kernel.engine import KernelEngine
from tests.conformance.graphdriver_base import GRAPH
from tests.conformance.graphdriver_suite import GraphDriverSuite


@pytest.mark.kernel
class TestDriverOnKernelEngine(GraphDriverSuite):
    def make_engine(self) -> KernelEngine:
        return KernelEngine()

    def open(self, home: Path, *options: str) -> Driver:
        options = (*GRAPH, "dm.override_udev_sync_check=true", *options)
        return devmapper.init(home, options, engine=self.make_engine())
