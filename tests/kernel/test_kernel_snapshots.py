"""Snapshots on the kernel's device mapper."""

import pytest

from devmapper.engine.kernel.engine import KernelEngine
from tests.conformance.snapshot_kills import SnapshotKillSuite
from tests.conformance.snapshots_suite import SnapshotsSuite


@pytest.mark.kernel
class TestSnapshotsOnKernelEngine(SnapshotsSuite):
    def make_engine(self) -> KernelEngine:
        return KernelEngine()


@pytest.mark.kernel
class TestSnapshotKillsOnKernelEngine(SnapshotKillSuite):
    def make_engine(self) -> KernelEngine:
        return KernelEngine()
