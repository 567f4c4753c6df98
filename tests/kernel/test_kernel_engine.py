"""The conformance suites on the kernel's device mapper, with loop devices made here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devmapper.engine.kernel.engine import KernelEngine
from devmapper.linux import loop
from devmapper.units import Bytes
from tests.conformance.engine_suite import EngineSuite
from tests.conformance.kill_suite import KillSuite
from tests.support import dm


@pytest.mark.kernel
class TestKernelEngine(EngineSuite):
    def make_engine(self) -> KernelEngine:
        return KernelEngine()

    @contextmanager
    def backing(self, file: Path) -> Iterator[Path]:
        with loop.attached(file, direct_io=False) as node:
            yield node

    def grow(self, device: Path, size: Bytes) -> None:
        os.truncate(loop.status(device).backing_file, size)

    def settle(self) -> None:
        dm.settle()


@pytest.mark.kernel
class TestKillAtStepsOnKernelEngine(KillSuite):
    def make_engine(self) -> KernelEngine:
        return KernelEngine()
