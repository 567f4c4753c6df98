"""Snapshots on the embedded engine."""

import pytest

from devmapper.engine.embedded.client import EmbeddedEngine
from tests.conformance.snapshots_suite import SnapshotsSuite


@pytest.mark.root
@pytest.mark.fuse
class TestSnapshotsOnEmbeddedEngine(SnapshotsSuite):
    def make_engine(self) -> EmbeddedEngine:
        return EmbeddedEngine()
