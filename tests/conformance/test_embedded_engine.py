"""The conformance suite on the embedded engine, with its process, socket, FUSE and loop devices."""

import pytest

from devmapper.engine.embedded.client import EmbeddedEngine
from tests.conformance.engine_suite import EngineSuite


@pytest.mark.root
@pytest.mark.fuse
class TestEmbeddedEngine(EngineSuite):
    def make_engine(self) -> EmbeddedEngine:
        return EmbeddedEngine()
