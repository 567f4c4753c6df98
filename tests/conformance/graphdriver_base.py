"""A graph driver for each test of a suite, and the end of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import devmapper
from devmapper.driver import Driver
from devmapper.engine.port import Engine
from devmapper.linux import mount
from tests.support import capabilities, thin_tools

# moby's own tests use these sizes (devmapper_test.go)
GRAPH = (
    "dm.loopdatasize=300M",
    "dm.loopmetadatasize=200M",
    "dm.basesize=300M",
    "dm.override_udev_sync_check=true",  # the guest's kernel has no udev; others do not mind
)


def clean_up(driver: Driver) -> None:
    """End with everything unmounted, the pool closed and its metadata sound."""
    if driver.devices.is_open:
        driver.cleanup()
    home = driver.home
    assert not any(str(m.mount_point).startswith(str(home)) for m in mount.mountinfo())
    assert not list((home / "mnt").iterdir()) if (home / "mnt").exists() else True
    if not capabilities.tools():
        assert thin_tools.thin_check(home / "devicemapper" / "metadata")


class GraphDriverBase:
    def make_engine(self) -> Engine:
        raise NotImplementedError

    def open(self, home: Path, *options: str) -> Driver:
        return devmapper.init(home, (*GRAPH, *options), engine=self.make_engine())

    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        return tmp_path / "graph"

    @pytest.fixture
    def driver(self, home: Path) -> Iterator[Driver]:
        driver = self.open(home)
        try:
            yield driver
        finally:
            clean_up(driver)
