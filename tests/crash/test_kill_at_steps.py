"""SIGKILL at every step, on the embedded engine with its process, socket, FUSE and loop devices."""

import pytest

from devmapper.engine.embedded.client import EmbeddedEngine
from tests.conformance.kill_suite import KillSuite
from tests.conformance.snapshot_kills import SnapshotKillSuite


@pytest.mark.root
@pytest.mark.fuse
class TestKillAtStepsOnEmbeddedEngine(KillSuite):
    def make_engine(self) -> EmbeddedEngine:
        return EmbeddedEngine()


@pytest.mark.root
@pytest.mark.fuse
class TestSnapshotKillsOnEmbeddedEngine(SnapshotKillSuite):
    def make_engine(self) -> EmbeddedEngine:
        return EmbeddedEngine()
