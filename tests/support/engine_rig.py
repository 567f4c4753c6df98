"""A pool in an engine process of its own, for tests that treat the process badly."""

import os
import signal
from pathlib import Path

from devmapper.engine.embedded import runtime
from devmapper.engine.embedded.client import EmbeddedEngine, EmbeddedPoolClient
from devmapper.engine.port import PoolTable
from devmapper.linux import process
from devmapper.units import KIB, MIB, Bytes
from tests.support import capabilities

POOL = "rig"
DATA_SIZE = Bytes(2048 * MIB)
METADATA_SIZE = Bytes(16 * MIB)


class Rig:
    """One pool and whoever serves it now."""

    def __init__(self, directory: Path) -> None:
        for name, size in (("metadata", METADATA_SIZE), ("data", DATA_SIZE)):
            (directory / name).touch()
            os.truncate(directory / name, size)
        self.directory = directory
        self.table = PoolTable(
            directory / "metadata", directory / "data", DATA_SIZE, Bytes(64 * KIB)
        )
        self.engine = EmbeddedEngine()
        self.paths = runtime.paths_of(POOL)

    def activate(self) -> EmbeddedPoolClient:
        return self.engine.activate_pool(POOL, self.table)

    def deactivate(self) -> None:
        self.engine.deactivate_pool(POOL)
        self.check()

    def server(self) -> process.ProcessIdentity:
        identity = runtime.read_pid(self.paths)
        assert identity is not None
        return identity

    def kill(self) -> None:
        """SIGKILL the engine process and wait until it is gone."""
        identity = self.server()
        assert identity.send_signal(signal.SIGKILL)
        assert identity.wait(60)

    def check(self) -> None:
        """The metadata on disk are sound, as they are; a pool that was never opened has none."""
        with open(self.table.metadata_device, "rb") as file:
            if file.read(4096) == bytes(4096):
                return
        if not capabilities.tools():
            process.run(["thin_check", str(self.table.metadata_device)])
