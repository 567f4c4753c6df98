"""What a graph driver must do about sizes, mount options, labels and owners, on every engine.

Cases of `graphdriver_suite.GraphDriverSuite`, in a file of their own.
"""

import io
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import devmapper
from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.id_maps import IdMap, container_root
from devmapper.deviceset.steps import Step
from devmapper.driver import Driver
from devmapper.errors import ArchiveError, DevmapperError, MountFailed, UsageError
from devmapper.linux import mount, xfs
from devmapper.units import MIB, Bytes, ThinId
from tests.conformance.graphdriver_base import GRAPH, GraphDriverBase, clean_up
from tests.support.fs_shutdown import shut_down

XFS = ("dm.fs=xfs", "dm.mkfsarg=-K")


def capacity(path: Path) -> int:
    """Size of the file system that holds *path*, without what it keeps for itself."""
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize


def ids(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


class SizesAndMounts(GraphDriverBase):
    @contextmanager
    def opened(self, home: Path, *options: str) -> Iterator[Driver]:
        """A driver that ends with everything unmounted and the pool closed."""
        driver = self.open(home, *options)
        try:
            yield driver
        finally:
            driver.cleanup()
            below = [m for m in mount.mountinfo() if str(m.mount_point).startswith(str(home))]
            assert below == []

    @pytest.fixture(params=["ext4", "xfs"])
    def fs(self, request):
        return XFS if request.param == "xfs" else ()

    def test_a_layer_with_a_size_of_its_own(self, home, fs):
        with self.opened(home, *fs) as driver:
            driver.create("parent")
            root = Path(driver.get("parent"))
            (root / "file").write_text("content")
            driver.create("large", "parent", storage_opt={"size": "700M"})  # its parent is mounted
            assert not driver.devices.has_activated_device("large")
            driver.put("parent")
            driver.create("child", "large")
            for layer in ("large", "child"):
                root = Path(driver.get(layer))
                assert (root / "file").read_text() == "content"
                assert 600 * MIB < capacity(root) <= 700 * MIB
                (root / "more").write_bytes(os.urandom(MIB))
                driver.put(layer)
                assert driver.get_metadata(layer)["DeviceSize"] == str(700 * MIB)
            root = Path(driver.get("parent"))
            assert capacity(root) <= 300 * MIB
            driver.put("parent")
            with pytest.raises(
                UsageError, match=rf"{300 * MIB} bytes .*'large'.*{700 * MIB} bytes"
            ):
                driver.create("small", "large", storage_opt={"size": "300M"})
            assert driver.layers() == ["child", "large", "parent"]
            assert list(driver.devices.inconsistencies()) == []

    def test_a_layer_that_cannot_grow_is_not_left_behind(self, home):
        with self.opened(home) as driver:
            driver.create("damaged")
            with self.active(driver, "damaged") as device, device.open("r+b") as file:
                file.seek(1024)
                file.write(bytes(1024))
            with pytest.raises((OSError, DevmapperError)):
                driver.create("large", "damaged", storage_opt={"size": "400M"})
            assert driver.layers() == ["damaged"]
            assert not (home / "metadata" / "large").exists()
            assert driver.devices.pool.devices() == []
            assert list(driver.devices.inconsistencies()) == []

    @contextmanager
    def active(self, driver: Driver, layer: str) -> Iterator[Path]:
        info = driver.devices.dev_info(layer)
        pool = driver.devices.pool
        yield pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        pool.deactivate(info.name())

    def test_a_layer_that_is_being_made_is_not_for_others(self, home):
        """Another process starts, and recovers, while its file system grows: nobody sees it."""
        engine = self.make_engine()
        with self.opened(home) as driver:
            reached, go_on = threading.Event(), threading.Event()

            def at(step: Step) -> None:
                if step is Step.LAYER_GROWN:
                    reached.set()
                    assert go_on.wait(60)

            failures: list[BaseException] = []
            making = DeviceSet(home, driver.devices.options, engine=engine, checkpoint=at)

            def make() -> None:
                try:
                    making.add_device("large", "", size=400 * MIB)
                except BaseException as err:
                    failures.append(err)
                    reached.set()

            maker = threading.Thread(target=make)
            maker.start()
            try:
                assert reached.wait(60)
                with self.open(home) as other:
                    assert other.layers() == []
                    other.create("beside")
                    assert other.layers() == ["beside"]
                driver.create("third")
            finally:
                go_on.set()
                maker.join()
                making.close()
            assert failures == []
            assert driver.layers() == ["beside", "large", "third"]
            root = Path(driver.get("large"))
            assert capacity(root) > 300 * MIB
            driver.put("large")
            assert list(driver.devices.inconsistencies()) == []

    def test_a_process_that_is_killed_while_it_makes_a_layer_leaves_none(self, home):
        code = (
            "import os, signal, sys\n"
            "from devmapper.deviceset.deviceset import DeviceSet\n"
            "from devmapper.deviceset.steps import Step\n"
            "from devmapper.engine.select import choose_engine\n"
            "def at(step):\n"
            "    if step is Step.LAYER_GROWN: os.kill(os.getpid(), signal.SIGKILL)\n"
            "engine = choose_engine(sys.argv[2])\n"
            "DeviceSet(sys.argv[1], engine=engine, checkpoint=at).add_device('x', '', size=4 << 28)"
        )
        with self.opened(home) as driver:
            name = driver.devices.status().engine
            done = subprocess.run([sys.executable, "-c", code, str(home), name])
            assert done.returncode == -9
            assert driver.layers() == []
            driver.create("one")
            assert driver.layers() == ["one"]
        with self.opened(home) as driver:
            assert not (home / "metadata" / "x").exists()
            assert driver.devices.pool.devices() == []
            assert list(driver.devices.inconsistencies()) == []

    def test_the_base_grows_by_option(self, home, fs):
        with self.opened(home, *fs) as driver:
            driver.create("old")
            assert dict(driver.status())["Base Device Size"] == "314.6 MB"
        for _ in range(2):  # the second time there is nothing to do
            with self.opened(home, "dm.basesize=500M") as driver:
                assert dict(driver.status())["Base Device Size"] == "524.3 MB"
                assert dict(driver.status())["Base Filesystem"] == "xfs" if fs else "ext4"
        with self.opened(home, "dm.basesize=500M") as driver:
            driver.create("new")
            for layer, low, high in (("old", 200, 300), ("new", 400, 500)):
                root = Path(driver.get(layer))
                assert low * MIB < capacity(root) <= high * MIB
                driver.put(layer)
            with pytest.raises(UsageError, match=rf"{300 * MIB} is smaller .*{500 * MIB} bytes"):
                self.open(home)
            assert driver.layers() == ["new", "old"]

    def test_the_base_grows_while_layers_are_mounted(self, home):
        with self.opened(home) as driver:
            driver.create("one")
            root = Path(driver.get("one"))
            with self.open(home, "dm.basesize=400M") as other:
                other.create("two")
                assert capacity(Path(other.get("two"))) > 300 * MIB
                other.put("two")
            assert capacity(root) <= 300 * MIB
            driver.create("three")  # by the driver that was open already
            assert driver.get_metadata("three")["DeviceSize"] == str(400 * MIB)
            driver.put("one")

    def test_metadata_of_a_layer(self, driver):
        driver.create("one")
        info = driver.devices.dev_info("one")
        assert driver.get_metadata("one") == {
            "DeviceId": str(info.device_id),
            "DeviceSize": str(300 * MIB),
            "DeviceName": info.name(),
        }

    def test_retries_of_an_xfs_without_space(self, home):
        with self.opened(home, *XFS, "dm.xfs_nospace_max_retries=0") as driver:
            driver.create("one")
            driver.get("one")
            device = driver.devices.device_path("one")
            assert device is not None
            name = xfs.kernel_name(device)
            knob = Path("/sys/fs/xfs", name, "error/metadata/ENOSPC/max_retries")
            assert knob.read_text() == "0\n"
            driver.put("one")

    def test_retries_of_an_xfs_that_cannot_be_limited(self, home, monkeypatch):
        with self.opened(home, *XFS, "dm.xfs_nospace_max_retries=5") as driver:
            driver.create("one")
            # the one thing that cannot be arranged with a real kernel that has the knob
            monkeypatch.setattr(xfs, "kernel_name", lambda device: "no_such_device")
            with pytest.raises(MountFailed, match="xfs_nospace_max_retries=5") as caught:
                driver.get("one")
            assert "cannot limit" in str(caught.value)
            assert not driver.devices.is_mounted("one")
            assert not driver.devices.has_activated_device("one")
            assert not (home / "mnt" / "one").exists()

    def test_retries_are_nothing_to_ext4(self, home):
        with self.opened(home, "dm.xfs_nospace_max_retries=5") as driver:
            driver.create("one")
            driver.get("one")
            driver.put("one")

    @pytest.mark.parametrize("fs", [(), XFS], ids=["ext4", "xfs"])
    def test_a_file_system_that_has_shut_down_is_let_go(self, home, fs):
        """An xfs then refuses even to tell what its root is."""
        with self.opened(home, *fs) as driver:
            driver.create("one")
            root = Path(driver.get("one"))
            (root / "directory").mkdir()
            shut_down(root, has_log=True)
            with pytest.raises(OSError, match=r"Input/output error|Read-only file system"):
                (root / "another").mkdir()
            driver.put("one")
            assert "/directory" in [each.path for each in driver.changes("one", "")]
            shut_down(driver.get("one"), has_log=False)
            driver.put("one")
            driver.remove("one")
            assert not driver.exists("one")

    def test_a_read_only_layer(self, home, fs):
        with self.opened(home, *fs) as driver:
            driver.create("one")
            (Path(driver.get("one")) / "file").write_text("content")
            driver.put("one")
        with self.opened(home, "dm.mountopt=ro,noatime") as driver:
            root = Path(driver.get("one"))
            assert (root / "file").read_text() == "content"
            (entry,) = [m for m in mount.mountinfo() if m.mount_point == root.parent]
            assert {"ro", "noatime"} <= set(entry.options.split(","))
            with pytest.raises(OSError, match="Read-only"):
                (root / "file").write_text("x")
            driver.put("one")
            driver.create("new")
            with pytest.raises(MountFailed, match=r"no 'rootfs' yet and is mounted read-only"):
                driver.get("new")
            assert not driver.devices.is_mounted("new")
            assert not (home / "mnt" / "new").exists()

    def test_flags_and_options_of_both_file_systems(self, home, fs):
        own = "inode64" if fs else "data=ordered"
        chosen = f"dm.mountopt=nosuid,nodev,noexec,nodiratime,{own}"
        with self.opened(home, *fs, chosen) as driver:
            driver.create("one")
            root = Path(driver.get("one"))
            (entry,) = [m for m in mount.mountinfo() if m.mount_point == root.parent]
            assert {"nosuid", "nodev", "noexec", "nodiratime"} <= set(entry.options.split(","))
            if fs:
                assert {"nouuid", "inode64"} <= set(entry.super_options.split(","))
            driver.put("one")

    def test_why_a_mount_failed(self, home, fs):
        with self.opened(home, *fs, "dm.mountopt=no_such_option") as driver:
            driver.create("one")
            with pytest.raises(MountFailed, match=r"Invalid argument \(.*no_such_option"):
                driver.get("one")

    def test_a_label(self, driver, home, caplog):
        """What a kernel with SELinux takes, and one without it refuses for a reason it tells."""
        label = "system_u:object_r:container_file_t:s0:c1,c2"
        driver.create("one")
        refused = None
        try:
            driver.get("one", label)
        except MountFailed as err:
            refused = err
        if refused is not None:  # no SELinux in this kernel, or no policy loaded
            assert "context" in str(refused) or "SELinux" in str(refused)
            no_selinux = "selinuxfs" not in Path("/proc/filesystems").read_text()
            assert ("no SELinux" in refused.hint) is no_selinux
            assert not driver.devices.has_activated_device("one")
            driver.get("one")
        assert "has no effect" not in caplog.text
        driver.get("one", "system_u:object_r:other_t:s0")
        assert "label 'system_u:object_r:other_t:s0' has no effect" in caplog.text
        with pytest.raises(UsageError, match="no SELinux label"):
            driver.get("one", 'x",ro,context="y')
        driver.put("one")
        driver.put("one")
        assert not driver.devices.has_activated_device("one")

    def test_the_root_belongs_to_the_containers_root(self, home):
        maps = [IdMap(0, 100000, 65536)], [IdMap(0, 200000, 65536)]
        with self.opened(home) as driver:
            driver.create("before")
            root = Path(driver.get("before"))
            assert ids(root) == (0, 0)
            driver.put("before")
            assert ids(home) == (0, 0)
            options = driver.devices.options
        owner = container_root(*maps)
        devices = DeviceSet(home, options, engine=self.make_engine(), owner=owner)
        with Driver(devices) as driver:
            driver.create("one")
            driver.create("two", "before")
            for layer in ("one", "two"):
                root = Path(driver.get(layer))
                assert ids(root) == (100000, 200000)
                os.chown(root, 100007, 200007)
                assert ids(home / "mnt" / layer) == (0, 0), "the file system's own top"
                driver.put(layer)
                # an owner that the image chose stays
                assert ids(Path(driver.get(layer))) == (100007, 200007)
                driver.put(layer)
            assert ids(home) == ids(home / "mnt") == (100000, 200000)
            assert ids(home / "metadata") == (0, 0)
            assert (home.stat().st_mode & 0o777, (home / "mnt").stat().st_mode & 0o777) == (
                0o700,
                0o755,
            )
            driver.cleanup()

    def test_tars_hold_the_containers_ids(self, home):
        uids, gids = [IdMap(0, 100000, 1000)], [IdMap(0, 200000, 500), IdMap(500, 300000, 500)]
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            for name, uid, gid in (("a/b/file", 7, 600), ("own", 0, 0)):
                member = tarfile.TarInfo(name)
                member.uid, member.gid = uid, gid
                archive.addfile(member)
        foreign = tarfile.TarInfo("foreign")
        foreign.uid = 1000
        driver = devmapper.init(
            home, GRAPH, engine=self.make_engine(), uid_maps=iter(uids), gid_maps=iter(gids)
        )
        try:
            driver.create("one")
            raw.seek(0)
            driver.apply_diff("one", "", raw)
            root = Path(driver.get("one"))
            assert ids(root / "a/b/file") == (100007, 300100)
            assert ids(root / "a") == ids(root / "a/b") == ids(root / "own") == (100000, 200000)
            driver.create("two", "one")
            with pytest.raises(ArchiveError, match="user id 1000 is in none of the maps"):
                driver.apply_diff("two", "one", io.BytesIO(foreign.tobuf()))
            root = Path(driver.get("two"))
            os.chown(root / "own", 100999, 300499)
            written = io.BytesIO()
            driver.write_diff("two", "one", written)
            with driver.diff("two", "one") as stream:
                assert stream.read() == written.getvalue()
            written.seek(0)
            with tarfile.open(fileobj=written) as archive:
                assert [(m.name, m.uid, m.gid) for m in archive] == [("own", 999, 999)]
            for layer in ("one", "two"):
                driver.put(layer)
        finally:
            clean_up(driver)

    def test_maps_without_a_root_touch_nothing(self, tmp_path):
        home = tmp_path / "none"
        with pytest.raises(UsageError, match="no root"):
            devmapper.init(home, engine=self.make_engine(), uid_maps=[IdMap(1, 100000, 10)])
        assert not home.exists()

    def test_one_layer_by_two_at_once(self, driver):
        """Whoever comes while the last one leaves finds the mount point, or makes it."""
        driver.create("one")

        def use(seed: int) -> None:
            pauses = random.Random(seed)
            for _ in range(60):
                assert Path(driver.get("one")).is_dir()
                driver.put("one")
                time.sleep(pauses.uniform(0, 0.01))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(use, range(2)))
        assert not driver.devices.is_mounted("one")
        assert not (driver.home / "mnt" / "one").exists()
