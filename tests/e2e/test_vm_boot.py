"""A virtual machine boots from a snapshot, and a second one from the same base beside it."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from devmapper.driver import Driver
from devmapper.engine.embedded.client import EmbeddedEngine
from devmapper.engine.kernel.engine import KernelEngine
from devmapper.engine.port import Engine
from devmapper.errors import EnvironmentLacking, LayerBusy
from devmapper.snapshots import Kind, Snapshots
from tests.conformance.engine_suite import mounted as mounted_disk
from tests.conformance.graphdriver_base import GraphDriverBase, clean_up
from tests.conformance.snapshots_suite import mounted
from tests.support import vm

OPTIONS = ("dm.loopdatasize=2G", "dm.basesize=768M", "dm.fs=ext4")


class VmSuite(GraphDriverBase):
    @pytest.fixture
    def driver(self, home: Path) -> Iterator[Driver]:
        driver = self.open(home, *OPTIONS)
        try:
            yield driver
        finally:
            clean_up(driver)

    @pytest.fixture
    def snapshots(self, driver: Driver, tmp_path: Path) -> Snapshots:
        """Snapshots with a committed one, `debian`, that holds a Debian's root file system."""
        snapshots = Snapshots(driver.devices)
        with mounted(snapshots.prepare("unpacking"), tmp_path / "m") as root:
            unpack(vm.debian_root(), root)
        snapshots.commit("debian", "unpacking")
        return snapshots

    def disk_of(self, driver: Driver, device: str) -> str:
        """What the machine is given, for the block device of a snapshot."""
        return device

    def test_two_machines_boot_from_one_base(
        self, driver: Driver, snapshots: Snapshots, tmp_path: Path
    ) -> None:
        kernel = vm.kernel()
        reference = tmp_path / "base.raw"
        copy_of_base(snapshots, reference)
        devices = {}
        for name in ("one", "two"):
            (only,) = snapshots.prepare(name, "debian")
            assert only.type == "ext4"
            devices[name] = only.source
        layers = {name: layer_at(driver, device) for name, device in devices.items()}
        disks = {name: self.disk_of(driver, device) for name, device in devices.items()}
        with ExitStack() as stack:
            one, two = (stack.enter_context(vm.booted(disks[n], kernel)) for n in ("one", "two"))
            one.wait_for_prompt(0)
            two.wait_for_prompt(0)  # both are up at the same time
            for machine in (one, two):
                assert machine.run("id -u") == "0"
                assert " / ext4 rw" in machine.run("grep ' / ' /proc/mounts")
            assert one.run("mount | grep -c '^/dev/vda'") == "1"
            one.run(
                "head -c 3M /dev/urandom > /srv/random; echo of one > /srv/first; rm /etc/issue"
            )
            one.run("sync; md5sum /srv/random > /srv/sum; sync")
            assert "No such file" in two.run("cat /srv/first")
            two.run("echo of two > /srv/second; sync")
            assert one.run("cat /srv/first; ls -1 /srv") == "of one\nfirst\nrandom\nsum"
            assert two.run("ls -1 /srv /etc/issue") == "/etc/issue\n\n/srv:\nsecond"
            self.while_they_run(driver, layers["one"], one, tmp_path)
            one.power_off()
            two.power_off()
        self.take_back(driver, layers)
        with mounted(snapshots.mounts("one"), tmp_path / "m") as root:
            assert (root / "srv/first").read_text() == "of one\n"
            assert not (root / "etc/issue").exists()
            subprocess.run(
                ["chroot", root, "md5sum", "--quiet", "-c", "/srv/sum"], check=True, timeout=60
            )
        with mounted(snapshots.mounts("two"), tmp_path / "m") as root:
            assert sorted(path.name for path in (root / "srv").iterdir()) == ["second"]
        assert_base_is(snapshots, reference)
        # A machine's disk becomes a base itself
        snapshots.commit("debian-with-first", "one")
        assert snapshots.stat("debian-with-first").kind is Kind.COMMITTED
        for name in ("two", "debian-with-first", "debian"):
            snapshots.remove(name)

    def while_they_run(self, driver: Driver, layer: str, machine: vm.Machine, where: Path) -> None:
        """More to see of a machine's layer while it is up."""
        with pytest.raises(LayerBusy, match=f"process {machine.pid} "):
            driver.deactivate(layer)

    def take_back(self, driver: Driver, layers: dict[str, str]) -> None:
        """Undo `disk_of`."""


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.qemu
@pytest.mark.e2e
class TestBlockDeviceOfEmbeddedEngine(VmSuite):
    def make_engine(self) -> Engine:
        return EmbeddedEngine()


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.qemu
@pytest.mark.e2e
class TestNbd(VmSuite):
    """The same without a loop device."""

    def make_engine(self) -> Engine:
        return EmbeddedEngine()

    def disk_of(self, driver: Driver, device: str) -> str:
        layer = layer_at(driver, device)
        driver.deactivate(layer)
        uri = driver.serve_nbd(layer)
        assert uri.startswith("nbd+unix:///?socket=")
        return uri

    def while_they_run(self, driver: Driver, layer: str, machine: vm.Machine, where: Path) -> None:
        """A snapshot of a running machine is as after a loss of power: what it synced is there."""
        with pytest.raises(LayerBusy, match=rf"process {machine.pid} \(qemu-system-x86\) over NBD"):
            driver.deactivate(layer)
        driver.create("backup", layer)
        assert machine.run("echo later > /srv/later; cat /srv/first") == "of one"
        device = Path(driver.activate("backup"))
        with mounted_disk(device, where / "backup", "ext4") as root:
            assert (root / "srv/first").read_text() == "of one\n"
            assert not (root / "srv/later").exists()
        driver.remove("backup")
        machine.run("rm /srv/later")

    def take_back(self, driver: Driver, layers: dict[str, str]) -> None:
        for layer in layers.values():
            assert driver.deactivate(layer)


@pytest.mark.kernel
@pytest.mark.qemu
class TestBlockDeviceOfKernelEngine(VmSuite):
    def make_engine(self) -> Engine:
        return KernelEngine()

    def disk_of(self, driver: Driver, device: str) -> str:
        assert device.startswith("/dev/mapper/")
        with pytest.raises((EnvironmentLacking, LayerBusy)):
            driver.serve_nbd(layer_at(driver, device))
        return device


def unpack(archive: Path, root: Path) -> None:
    subprocess.run(
        ["tar", "--zstd", "--numeric-owner", "--xattrs", "-xf", archive, "-C", root],
        check=True,
        timeout=120,
    )


def layer_at(driver: Driver, device: str) -> str:
    """The layer whose block device this is."""
    (found,) = [
        layer for layer in driver.layers() if str(driver.devices.device_path(layer)) == device
    ]
    return found


def copy_of_base(snapshots: Snapshots, target: Path) -> None:
    (only,) = snapshots.view("look", "debian")
    qemu_img("convert", "-f", "raw", "-O", "raw", only.source, target)
    snapshots.remove("look")


def assert_base_is(snapshots: Snapshots, reference: Path) -> None:
    """Every byte of the base is as it was."""
    (only,) = snapshots.view("look", "debian")
    qemu_img("compare", "-f", "raw", "-F", "raw", only.source, reference)  # fails if they differ
    snapshots.remove("look")


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, timeout=120)
