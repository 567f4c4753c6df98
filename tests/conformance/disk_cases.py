"""Layers as disks: activated without a mount, on every engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devmapper.driver import Driver
from devmapper.errors import LayerBusy, LayerNotFound, UsageError
from devmapper.linux import blockdev
from tests.conformance.engine_suite import mounted
from tests.conformance.graphdriver_base import GraphDriverBase

HOLDER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_EXCL)
print("open", flush=True)
sys.stdin.read()
"""


class DiskCases(GraphDriverBase):
    def test_a_disk_is_a_block_device_without_a_mount(self, driver: Driver) -> None:
        driver.create("vm")
        path = Path(driver.activate("vm"))
        assert blockdev.is_block_device(path)
        assert driver.activate("vm") == str(path)
        assert driver.devices.device_path("vm") == path
        assert driver.devices.nbd_export("vm") is None
        assert not driver.devices.is_mounted("vm")
        assert driver.deactivate("vm")
        assert not driver.deactivate("vm")
        assert not driver.devices.has_activated_device("vm")

    def test_what_is_written_to_a_disk_is_in_its_snapshots(
        self, driver: Driver, tmp_path: Path
    ) -> None:
        driver.create("origin")
        disk, point = Path(driver.activate("origin")), tmp_path / "m"
        kind = blockdev.probe_fs_type(disk)
        with mounted(disk, point, kind) as root:
            (root / "file").write_text("of the origin")
        assert driver.deactivate("origin")
        for name in ("one", "two"):
            driver.create(name, "origin")
            disk = Path(driver.activate(name))
            with mounted(disk, point, kind) as root:
                assert (root / "file").read_text() == "of the origin"
                (root / "file").write_text(name)
            driver.deactivate(name)
        disk = Path(driver.activate("origin"))
        with mounted(disk, point, kind) as root:
            assert (root / "file").read_text() == "of the origin"
        driver.deactivate("origin")

    def test_a_disk_in_use_is_busy(self, driver: Driver) -> None:
        driver.create("vm")
        path = driver.activate("vm")
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"open\n"
            with pytest.raises(LayerBusy, match=f"process {holder.pid}"):
                driver.deactivate("vm")
            holder.communicate(b"")
        assert driver.deactivate("vm")

    def test_a_disk_that_is_mounted_here_is_busy(self, driver: Driver) -> None:
        driver.create("vm")
        driver.get("vm")
        with pytest.raises(LayerBusy, match="mounted at"):
            driver.deactivate("vm")
        driver.put("vm")
        assert not driver.deactivate("vm")

    def test_an_idle_disk_is_removed_with_its_layer(self, driver: Driver) -> None:
        driver.create("vm")
        driver.activate("vm")
        driver.remove("vm")
        assert not driver.exists("vm")

    def test_layers_that_are_not_there(self, driver: Driver) -> None:
        for call in (driver.activate, driver.deactivate, driver.serve_nbd):
            with pytest.raises(LayerNotFound):
                call("none")
            with pytest.raises(UsageError):
                call("../up")

    def test_a_disk_stays_when_the_graph_is_closed(self, driver: Driver, home: Path) -> None:
        driver.create("vm")
        path = driver.activate("vm")
        with blockdev.opened(Path(path), os.O_RDWR) as fd:
            os.pwrite(fd, b"here", 1 << 20)
            os.fsync(fd)
        driver.close()
        with self.open(home) as again:
            assert again.activate("vm") == path
            assert again.deactivate("vm")
            again.cleanup()
