"""The graph driver on the embedded engine, with its process, socket, FUSE and loop devices."""

import pytest

from devmapper.engine.embedded.client import EmbeddedEngine
from tests.conformance.graphdriver_suite import GraphDriverSuite


@pytest.mark.root
@pytest.mark.fuse
class TestDriverOnEmbeddedEngine(GraphDriverSuite):
    def make_engine(self) -> EmbeddedEngine:
        return EmbeddedEngine()
