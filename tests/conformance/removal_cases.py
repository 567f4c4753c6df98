"""Layers that are in use while somebody lets go of them: who holds them, what is put off, leaks."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devmapper.deviceset.deletion import Deletion
from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.names import LayerId
from devmapper.driver import Driver
from devmapper.engine.port import Activation
from devmapper.errors import (
    LayerBusy,
    LayerExists,
    LayerNotFound,
    LayerNotMounted,
    PoolFull,
    PoolMismatch,
)
from devmapper.linux import loop, mount
from devmapper.units import MIB, Bytes, ThinId
from tests.conformance.graphdriver_base import GRAPH, GraphDriverBase, clean_up
from tests.support.waiting import wait_for

DEFERRED = ("dm.use_deferred_removal=true", "dm.use_deferred_deletion=true")
REMOVAL = DEFERRED[:1]


@contextmanager
def running(*argv: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program that says so when it is where it should be; killed afterwards."""
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=cwd)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def in_other_namespace(script: str = "") -> tuple[str, ...]:
    """A shell with private copies of all mounts."""
    return ("unshare", "--mount", "sh", "-c", f"{script} echo ready; exec sleep 60")


def layer_state(driver: Driver, layer: str) -> Activation:
    info = driver.devices.pool.info(driver.devices.dev_info(layer).name())
    return Activation.ABSENT if info is None else info.state


class RemovalCases(GraphDriverBase):
    @contextmanager
    def opened(self, home: Path, *options: str, interval: float = 3600) -> Iterator[Driver]:
        devices = DeviceSet(
            home, (*GRAPH, *options), engine=self.make_engine(), deletion_interval=interval
        )
        driver = Driver(devices)
        try:
            yield driver
        finally:
            clean_up(driver)

    # Leaks into other mount namespaces

    def test_put_takes_the_copies_of_other_mount_namespaces_along(self, driver):
        driver.create("one")
        root = Path(driver.get("one"))
        with running(*in_other_namespace()) as child:
            assert str(root.parent) in Path(f"/proc/{child.pid}/mountinfo").read_text()
            driver.put("one")
            assert not root.parent.exists()
            assert str(root.parent) not in Path(f"/proc/{child.pid}/mountinfo").read_text()
            assert not driver.devices.has_activated_device("one")
            assert driver.remove("one") is Deletion.DONE

    def test_who_works_in_another_mount_namespace_is_named(self, driver):
        """His files outlive the mount; put can be made again when he is gone."""
        driver.create("one")
        root = Path(driver.get("one"))
        with running(*in_other_namespace(f"cd {root};")) as child:
            with pytest.raises(LayerBusy) as caught:
                driver.put("one")
            assert f"process {child.pid} " in str(caught.value)
            assert driver.devices.has_activated_device("one")
        driver.put("one")
        assert not driver.devices.has_activated_device("one")

    # Who holds it

    def test_processes_are_named(self, driver):
        driver.create("one")
        root = Path(driver.get("one"))
        (root / "file").write_text("x")
        waits = "print('ready', flush=True); time.sleep(600)"
        opens = f"import mmap, time; f = open({str(root / 'file')!r}, 'r+b');"
        maps = "m = mmap.mmap(f.fileno(), 0); f.close();"
        for program, cwd in (
            (f"{opens} {waits}", None),
            (f"import time; {waits}", root),
            (f"{opens} {maps} {waits}", None),
        ):
            with running(sys.executable, "-c", program, cwd=cwd) as child:
                with pytest.raises(LayerBusy) as caught:
                    driver.put("one")
                assert any(
                    holder.startswith(f"process {child.pid} (") for holder in caught.value.holders
                )
                assert mount.is_mount_point(root.parent)
        driver.put("one")

    def test_devices_on_a_layer_are_named(self, driver):
        driver.create("one")
        root = Path(driver.get("one"))
        with (root / "image").open("wb") as file:
            file.truncate(MIB)
        with loop.attached(root / "image") as node, pytest.raises(LayerBusy) as caught:
            driver.put("one")
        assert f"loop device {str(node)!r} on {str(root / 'image')!r}" in caught.value.holders
        driver.put("one")

    def test_a_device_that_stands_on_the_layers_device_is_named(self, driver):
        driver.create("one")
        info = driver.devices.dev_info("one")
        device = driver.devices.pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        with loop.attached(device) as node, pytest.raises(LayerBusy) as caught:
            driver.remove("one")
        assert f"loop device {str(node)!r} on {os.path.realpath(device)!r}" in [
            holder.replace(repr(str(device)), repr(os.path.realpath(device)))
            for holder in caught.value.holders
        ]
        assert driver.exists("one")
        wait_for(lambda: driver.remove("one") is Deletion.DONE)

    def test_others_create_layers_while_a_removal_waits(self, driver, home):
        """No graph's lock is held meanwhile, neither for threads nor for processes."""
        for layer in ("one", "other"):
            driver.create(layer)
        info = driver.devices.dev_info("one")
        device = driver.devices.pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        ended: list[Deletion] = []
        thread = threading.Thread(target=lambda: ended.append(driver.remove("one")))
        with device.open("rb"):
            thread.start()
            driver.create("two", "other")
            with self.open(home) as process:
                process.create("three", "other")
            assert ended == []
        thread.join()
        assert ended == [Deletion.DONE]
        assert driver.layers() == ["other", "three", "two"]

    # Deferred removal

    def test_the_snapshot_of_a_layer_that_is_leaving(self, home):
        with self.opened(home, *REMOVAL) as driver:
            driver.create("one")
            root = Path(driver.get("one"))
            (root / "file").write_text("kept")
            node = driver.devices.device_path("one")
            assert node is not None
            with node.open("rb"):
                driver.put("one")
                assert layer_state(driver, "one") is Activation.LEAVING
                driver.create("two", "one")
                assert layer_state(driver, "one") is Activation.LEAVING
                with pytest.raises(LayerNotMounted):
                    driver.put("one")
            wait_for(lambda: layer_state(driver, "one") is Activation.ABSENT)
            assert (Path(driver.get("two")) / "file").read_text() == "kept"
            driver.put("two")
            assert driver.remove("one") is Deletion.DONE

    def test_a_mount_that_fails_lets_the_device_leave_again(self, home):
        with self.opened(home, *REMOVAL) as driver:
            driver.create("one")
            driver.get("one")
            node = driver.devices.device_path("one")
            assert node is not None
            with node.open("rb"):
                driver.put("one")
                with pytest.raises(LayerBusy, match="another mount"):
                    driver.devices.mount_device("one", "/proc")
                assert layer_state(driver, "one") is Activation.LEAVING
            wait_for(lambda: layer_state(driver, "one") is Activation.ABSENT)

    # Deferred deletion

    def test_a_mounted_layer_is_deleted_by_its_last_put(self, home):
        with self.opened(home, *DEFERRED) as driver:
            driver.create("one")
            root = Path(driver.get("one"))
            driver.get("one")
            (root / "file").write_text("still there")
            assert driver.remove("one") is Deletion.PUT_OFF
            assert (root / "file").read_text() == "still there"
            assert not driver.exists("one")
            assert driver.layers() == []
            assert [line.id for line in driver.usage()] == ["base"]
            rows = dict(driver.status())
            assert rows["Deferred Deletion Enabled"] == "true"
            assert rows["Deferred Deleted Device Count"] == "1"
            with pytest.raises(LayerNotFound):
                driver.get("one")
            with pytest.raises(LayerNotFound):
                driver.create("two", "one")
            with pytest.raises(LayerExists, match="being deleted"):
                driver.create("one")
            assert driver.remove("one") is Deletion.DONE, "nobody has it any more"
            driver.put("one")
            assert mount.is_mount_point(root.parent)
            driver.put("one")
            assert not root.parent.exists()
            assert driver.devices.status().deferred_deleted_count == 0
            with pytest.raises(LayerNotFound):
                driver.put("one")
            driver.create("one")
            assert list(driver.devices.inconsistencies()) == []

    def test_the_worker_deletes_a_layer_when_its_last_user_is_gone(self, home):
        with self.opened(home, *DEFERRED, interval=0.05) as driver:
            driver.create("one")
            root = Path(driver.get("one"))
            (root / "big").write_bytes(os.urandom(5 * MIB))
            node = driver.devices.device_path("one")
            assert node is not None
            with node.open("rb") as held:
                driver.put("one")
                assert driver.remove("one") is Deletion.PUT_OFF
                used = driver.devices.status().data.used
                assert len(held.read(4096)) == 4096, "its blocks are not discarded"
            wait_for(lambda: driver.devices.status().deferred_deleted_count == 0)
            assert driver.devices.status().data.used <= used - 5 * MIB
            assert not (home / "metadata" / "one").exists()

    def test_a_leaked_mount_puts_a_deletion_off(self, home):
        with self.opened(home, *DEFERRED) as driver:
            driver.create("one")
            root = Path(driver.get("one"))
            with running(*in_other_namespace(f"cd {root};")):
                driver.put("one")
                assert driver.remove("one") is Deletion.PUT_OFF
                assert not driver.exists("one")
            driver.create("one")  # as soon as he is gone
            driver.create("two", "one")

    def test_the_next_driver_completes_a_deletion(self, driver, home):
        other = Driver(DeviceSet(home, (*GRAPH, *DEFERRED), engine=self.make_engine()))
        other.create("one")
        other.get("one")
        assert other.remove("one") is Deletion.PUT_OFF
        other.close()
        assert driver.layers() == []
        mount.unmount(home / "mnt" / "one")
        with self.open(home) as third:
            assert third.devices.status().deferred_deleted_count == 0
        driver.create("one")

    # A restart between get and put

    def test_users_with_a_name_are_remembered(self, driver, home):
        """A daemon that was killed goes on counting where it was."""
        driver.create("a")
        path = Path(driver.get("a", user="docker"))
        driver.get("a", user="docker")
        driver.get("a", user="cli", once=True)
        with self.open(home) as second:
            second.get("a", user="cli", once=True)
            assert second.devices.parts.mounts.users(LayerId("a")) == {"docker": 2, "cli": 1}
            with pytest.raises(LayerBusy, match="held by cli, docker"):
                second.put("a", user="containerd")
            second.put("a", user="cli")
            second.put("a", user="docker")
            assert path.is_dir()
        with self.open(home) as third:
            third.put("a", user="docker")
            assert not path.exists()
            with pytest.raises(LayerNotMounted):
                third.put("a", user="docker")
            third.get("a")  # nothing is left of those who were
            third.put("a", user="docker")  # somebody without a name leaves for anybody
        assert not path.exists()

    def test_a_driver_puts_what_another_got(self, driver, home):
        driver.create("one")
        root = Path(driver.get("one"))
        with self.open(home) as again:  # a driver that is closed and one that was killed are equal
            again.put("one")
            assert not root.parent.exists()
            assert not again.devices.has_activated_device("one")
            with pytest.raises(LayerNotMounted):
                again.put("one")
        with pytest.raises(LayerNotMounted):
            driver.put("one")

    # Records and pool that disagree; room

    def test_a_layer_whose_thin_device_is_missing(self, driver):
        for layer in ("one", "two"):
            driver.create(layer)
        driver.devices.pool.delete(ThinId(driver.devices.dev_info("one").device_id))
        driver.devices.pool.commit()
        uses: list[Callable[[], object]] = [
            lambda: driver.get("one"),
            lambda: driver.create("x", "one"),
            lambda: driver.changes("one"),
        ]
        for use in uses:
            with pytest.raises(PoolMismatch, match="layer 'one': its thin id 2 is not in the pool"):
                use()
        assert not (driver.home / "mnt" / "one").exists()
        driver.create("three", "two")
        driver.get("three")
        driver.put("three")
        assert list(driver.devices.inconsistencies()) == [
            "layer 'one': its thin id 2 is not in the pool"
        ]
        driver.remove("one")
        assert list(driver.devices.inconsistencies()) == []

    def test_a_thin_device_that_no_layer_has_stays(self, driver):
        driver.devices.pool.create_thin(ThinId(2))
        driver.create("one")
        driver.create("two", "one")
        assert [driver.devices.dev_info(layer).device_id for layer in ("one", "two")] == [3, 4]
        assert driver.devices.consistency().unknown == (2,)
        driver.devices.pool.delete(ThinId(2))

    def test_no_layer_is_made_when_too_little_is_free(self, driver, home):
        driver.create("one")
        root = Path(driver.get("one"))
        (root / "big").write_bytes(os.urandom(20 * MIB))
        driver.put("one")
        with self.open(home, "dm.min_free_space=95%") as strict:
            with pytest.raises(PoolFull) as caught:
                strict.create("two", "one")
            assert "dm.min_free_space=95%" in caught.value.hint
            assert strict.layers() == ["one"]
        driver.create("two", "one")
