"""What a graph driver must do, whatever engine it stands on: moby's graphtest and more.

A subclass says which engine; every test gets a driver on a small graph of its own, and afterwards
the pool is closed and thin_check has the last word.
"""

import io
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import devmapper
import devmapper.errors
from devmapper.engine.port import Activation
from devmapper.errors import (
    LayerBusy,
    LayerExists,
    LayerNotFound,
    LayerNotMounted,
    MountFailed,
    PoolMismatch,
    UsageError,
)
from devmapper.linux import loop, mount
from devmapper.units import MIB
from tests.conformance.disk_cases import DiskCases
from tests.conformance.fast_diff import FastDiffCases
from tests.conformance.graphdriver_base import GRAPH, clean_up
from tests.conformance.removal_cases import RemovalCases
from tests.conformance.sizes_and_mounts import SizesAndMounts
from tests.support import export_tree
from tests.support.waiting import wait_for

WORKER = """
import sys, devmapper, pathlib
home, name, *options = sys.argv[1:]
for number in range(3):
    layer = f"{name}-{number}"
    with devmapper.init(home, options) as driver:
        driver.create(layer, "parent")
        (pathlib.Path(driver.get(layer)) / "f").write_text(layer)
        driver.put(layer)
        if number == 1:
            driver.remove(layer)
"""


def file_tree(root: Path) -> dict[str, export_tree.Inode]:
    return export_tree.of_tree(root)


class GraphDriverSuite(RemovalCases, SizesAndMounts, DiskCases, FastDiffCases):
    def test_create_empty(self, driver):
        driver.create("empty")
        assert driver.exists("empty")
        root = Path(driver.get("empty"))
        assert root == driver.home / "mnt" / "empty" / "rootfs"
        status = root.lstat()
        assert stat.S_ISDIR(status.st_mode)
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o755, 0, 0)
        assert list(root.iterdir()) == []
        stamp = root.parent / "id"
        assert stamp.read_bytes() == b"empty"
        assert stat.S_IMODE(stamp.stat().st_mode) == 0o600
        driver.put("empty")

    def test_create_base_and_snapshots(self, driver):
        driver.create("base1")
        root = Path(driver.get("base1"))
        (root / "a file").write_bytes(os.urandom(100_000))
        (root / "a file").chmod(0o4755)
        os.chown(root / "a file", 1, 2)
        (root / "a dir").mkdir(mode=0o705)
        (root / "a dir" / "link").symlink_to("../a file")
        os.link(root / "a file", root / "a dir" / "hard")
        before = file_tree(root)
        driver.put("base1")
        driver.create("snap", "base1")
        snap = Path(driver.get("snap"))
        assert file_tree(snap) == before
        (snap / "a file").write_bytes(b"changed")
        (snap / "more").mkdir()
        driver.put("snap")
        assert file_tree(Path(driver.get("base1"))) == before
        driver.put("base1")
        # the id stays that of the first layer that was ever mounted
        snap = Path(driver.get("snap"))
        assert (snap.parent / "id").read_bytes() == b"base1"
        driver.put("snap")

    def test_deep_layers(self, driver):
        parent = ""
        for depth in range(24):
            layer = f"layer{depth}"
            driver.create(layer, parent)
            root = Path(driver.get(layer))
            (root / f"f{depth}").write_text(str(depth))
            driver.put(layer)
            parent = layer
        root = Path(driver.get(parent))
        assert [(root / f"f{depth}").read_text() for depth in range(24)] == [
            str(depth) for depth in range(24)
        ]
        driver.put(parent)

    def test_changes(self, driver):
        driver.create("parent")
        root = Path(driver.get("parent"))
        (root / "kept").write_text("kept")
        (root / "changed").write_text("old")
        (root / "gone").mkdir()
        (root / "gone" / "below").write_text("x")
        driver.put("parent")
        driver.create("child", "parent")
        root = Path(driver.get("child"))
        (root / "changed").write_text("newer")
        (root / "gone" / "below").unlink()
        (root / "gone").rmdir()
        (root / "added").mkdir()
        (root / "added" / "file").write_text("12345")
        driver.put("child")
        found = [(change.path, int(change.kind)) for change in driver.changes("child", "parent")]
        assert found == [("/added", 1), ("/added/file", 1), ("/changed", 0), ("/gone", 2)]
        assert driver.changes("parent", "parent") == []
        assert driver.diff_size("child", "parent") == 10
        assert not driver.devices.is_mounted("child")
        assert not driver.devices.is_mounted("parent")

    def test_diff_and_apply(self, driver):
        driver.create("parent")
        root = Path(driver.get("parent"))
        for number in range(50):
            (root / f"file{number}").write_bytes(os.urandom(1000 + number))
        driver.put("parent")
        driver.create("child", "parent")
        root = Path(driver.get("child"))
        for number in range(0, 50, 5):
            (root / f"file{number}").unlink()
        for number in range(1, 50, 5):
            (root / f"file{number}").write_bytes(os.urandom(500))
        (root / "new").mkdir(mode=0o700)
        os.mkfifo(root / "new" / "fifo")
        expected = file_tree(root)
        driver.put("child")
        driver.create("copy", "parent")
        with driver.diff("child", "parent") as stream:
            driver.apply_diff("copy", "parent", stream)
        assert file_tree(Path(driver.get("copy"))) == expected
        driver.put("copy")
        assert driver.changes("copy", "child") == []
        whole = io.BytesIO()
        driver.write_diff("child", "", whole)
        driver.create("alone")
        whole.seek(0)
        driver.apply_diff("alone", "", whole)
        assert file_tree(Path(driver.get("alone"))) == expected
        driver.put("alone")

    def test_a_reader_that_stops_early_leaves_nothing_mounted(self, driver):
        driver.create("one")
        root = Path(driver.get("one"))
        (root / "big").write_bytes(os.urandom(3 * MIB))
        driver.put("one")
        with driver.diff("one") as stream:
            assert len(stream.read(1000)) == 1000
            assert driver.devices.is_mounted("one")
        assert not driver.devices.is_mounted("one")

    def test_an_archive_that_is_refused_leaves_nothing_mounted(self, driver):
        driver.create("one")
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("../escape"))
        out.seek(0)
        with pytest.raises(devmapper.errors.ArchiveError):
            driver.apply_diff("one", "", out)
        assert not driver.devices.is_mounted("one")
        assert not (driver.home / "mnt" / "escape").exists()

    def test_gets_are_counted(self, driver):
        driver.create("one")
        first, second = driver.get("one"), driver.get("one")
        assert first == second
        driver.put("one")
        assert devmapper.mounted(Path(first).parent)
        assert driver.devices.has_activated_device("one")
        driver.put("one")
        assert not Path(first).parent.exists()
        assert not driver.devices.has_activated_device("one")
        with pytest.raises(LayerNotMounted):
            driver.put("one")

    def test_a_layer_in_use_is_busy_and_stays_as_it_was(self, driver):
        driver.create("one")
        root = Path(driver.get("one"))
        (root / "open").write_text("x")
        with pytest.raises(LayerBusy, match="mounted at"):
            driver.remove("one")
        with (root / "open").open() as held:
            with pytest.raises(LayerBusy) as caught:
                driver.put("one")
            assert str(os.getpid()) in str(caught.value)
            assert held.read() == "x"
        assert (root / "open").exists()
        driver.put("one")
        driver.remove("one")
        assert not driver.exists("one")

    def test_unknown_and_unfit_ids(self, driver):
        with pytest.raises(LayerNotFound):
            driver.get("nobody")
        assert not (driver.home / "mnt" / "nobody").exists()
        with pytest.raises(LayerNotFound):
            driver.create("x", "nobody")
        with pytest.raises(LayerNotFound):
            driver.put("nobody")
        driver.remove("nobody")
        assert not driver.exists("nobody")
        driver.create("one")
        with pytest.raises(LayerExists):
            driver.create("one")
        for unfit in ("", "..", "a/b", ".x", "base", "x" * 256, "a\0"):
            with pytest.raises(UsageError):
                driver.create(unfit)
            with pytest.raises(UsageError):
                driver.remove(unfit)
            with pytest.raises(UsageError):
                driver.get(unfit)
        with pytest.raises(UsageError, match="smaller than its parent"):
            driver.create("sized", storage_opt={"size": "20M"})
        with pytest.raises(UsageError, match="unknown"):
            driver.create("odd", storage_opt={"colour": "red"})
        assert driver.layers() == ["one"]

    def test_the_longest_id(self, driver):
        layer = "x" * 255
        driver.create(layer)
        root = Path(driver.get(layer))
        (root / "f").write_text("x")
        driver.put(layer)
        driver.remove(layer)

    def test_a_layer_is_reopened(self, driver, home):
        driver.create("one")
        root = Path(driver.get("one"))
        (root / "f").write_text("kept")
        driver.put("one")
        driver.cleanup()
        again = self.open(home)
        try:
            root = Path(again.get("one"))
            assert (root / "f").read_text() == "kept"
            again.put("one")
        finally:
            clean_up(again)

    def test_close_lets_go_and_leaves_mounts(self, driver, home):
        driver.create("one")
        root = Path(driver.get("one"))
        driver.close()
        driver.close()
        assert devmapper.mounted(root.parent)
        again = self.open(home)
        try:
            assert again.get("one") == str(root)
            again.put("one")
            assert devmapper.mounted(root.parent), "the mount that was there counts as one user"
            again.put("one")
            assert not root.parent.exists()
        finally:
            clean_up(again)

    def test_two_drivers_on_one_graph(self, driver, home):
        other = self.open(home)
        driver.create("one")
        other.create("two", "one")
        root = Path(driver.get("two"))
        with pytest.raises(LayerBusy):
            other.remove("two")
        other.get("two")
        other.put("two")
        assert devmapper.mounted(root.parent)
        driver.put("two")
        other.remove("two")
        assert driver.layers() == other.layers() == ["one"]
        other.close()

    def test_a_snapshot_of_a_mounted_layer_is_consistent(self, driver):
        driver.create("one")
        root = Path(driver.get("one"))
        for number in range(20):
            (root / f"f{number}").write_bytes(bytes([number]) * 10_000)  # not synced
        driver.create("snap", "one")
        before = file_tree(root)
        (root / "after").write_text("after")
        snap = Path(driver.get("snap"))
        assert file_tree(snap) == before
        driver.put("snap")
        driver.put("one")

    def test_removing_a_layer_gives_its_space_back(self, driver):
        driver.create("one")
        before = driver.devices.status().data.used
        root = Path(driver.get("one"))
        (root / "big").write_bytes(os.urandom(20 * MIB))
        driver.put("one")
        full = driver.devices.status().data.used
        assert full - before >= 20 * MIB
        data = driver.home / "devicemapper" / "data"
        taken = data.stat().st_blocks * 512
        driver.remove("one")
        assert driver.devices.status().data.used <= before
        driver.cleanup()  # everything passed down by now
        assert taken - data.stat().st_blocks * 512 >= 19 * MIB

    def test_usage(self, driver):
        driver.create("one")
        root = Path(driver.get("one"))
        (root / "big").write_bytes(os.urandom(5 * MIB))
        driver.put("one")
        driver.create("two", "one")
        usage = {line.id: line for line in driver.usage()}
        assert set(usage) == {"base", "one", "two"}
        for line in usage.values():
            assert line.mapped == line.exclusive + line.shared
            status = driver.devices.get_device_status("" if line.id == "base" else line.id)
            assert status.mapped_sectors * 512 == line.mapped
            assert status.size == line.size == 300 * MIB
        assert usage["two"].shared >= 5 * MIB
        assert usage["two"].exclusive == 0

    def test_a_root_that_is_a_link_is_refused(self, driver, tmp_path):
        outside = tmp_path / "outside"
        outside.mkdir()
        driver.create("one")
        root = Path(driver.get("one"))
        root.rmdir()
        root.symlink_to(outside)
        driver.put("one")
        with pytest.raises(MountFailed, match="rootfs"):
            driver.get("one")
        assert not driver.devices.is_mounted("one")
        assert list(outside.iterdir()) == []

    def test_an_id_file_that_is_a_link_is_not_followed(self, driver, tmp_path):
        target = tmp_path / "target"
        driver.create("one")
        root = Path(driver.get("one"))
        (root.parent / "id").unlink()
        (root.parent / "id").symlink_to(target)
        driver.put("one")
        driver.get("one")
        driver.put("one")
        assert not target.exists()

    def test_a_mount_that_fails_undoes_the_activation(self, home):
        driver = self.open(home, "dm.mountopt=noatime,no_such_option")
        try:
            driver.create("one")
            with pytest.raises(MountFailed):
                driver.get("one")
            assert not driver.devices.has_activated_device("one")
            assert not (home / "mnt" / "one").exists()
        finally:
            clean_up(driver)

    def test_mount_options_are_told_apart(self, home):
        driver = self.open(home, "dm.mountopt=noatime,nodev", "dm.mountopt=discard")
        try:
            driver.create("one")
            root = Path(driver.get("one"))
            (entry,) = [m for m in mount.mountinfo() if m.mount_point == root.parent]
            assert {"noatime", "nodev"} <= set(entry.options.split(","))
            assert "discard" in entry.super_options.split(",")
            driver.put("one")
        finally:
            clean_up(driver)

    def test_xfs_layers_are_mounted_side_by_side(self, home):
        driver = self.open(home, "dm.fs=xfs", "dm.mkfsarg=-K")
        try:
            driver.create("one")
            driver.create("two", "one")
            roots = [Path(driver.get(layer)) for layer in ("one", "two")]
            for root in roots:
                (root / "f").write_text(str(root))
            assert [(root / "f").read_text() for root in roots] == [str(root) for root in roots]
            device = driver.devices.device_path("one")
            assert device is not None
            assert devmapper.probe_fs_type(device) == "xfs"
            driver.put("one")
            driver.put("two")
        finally:
            clean_up(driver)

    def test_status_rows(self, driver):
        names = [name for name, _ in driver.status()]
        assert names == [
            "Pool Name",
            "Pool Blocksize",
            "Base Device Size",
            "Backing Filesystem",
            "Data file",
            "Metadata file",
            "Data Space Used",
            "Data Space Total",
            "Data Space Available",
            "Metadata Space Used",
            "Metadata Space Total",
            "Metadata Space Available",
            "Thin Pool Minimum Free Space",
            "Udev Sync Supported",
            "Deferred Removal Enabled",
            "Deferred Deletion Enabled",
            "Deferred Deleted Device Count",
            "Data loop file",
            "Metadata loop file",
            "Library Version",
            "Base Filesystem",
            "Engine",
        ]
        rows = dict(driver.status())
        assert rows["Pool Blocksize"] == "65.54 kB"
        assert rows["Data Space Total"] == "314.6 MB"
        assert rows["Metadata Space Total"] == "209.7 MB"
        assert rows["Thin Pool Minimum Free Space"] == "31.46 MB"
        assert rows["Deferred Removal Enabled"] == rows["Deferred Deletion Enabled"] == "false"
        assert rows["Deferred Deleted Device Count"] == "0"
        assert rows["Data loop file"] == str(driver.home / "devicemapper" / "data")
        assert str(driver) == "devicemapper"

    def test_resize_while_a_layer_is_mounted(self, driver):
        driver.create("one")
        driver.get("one")
        driver.devices.resize_pool(400 * MIB)
        assert driver.devices.status().data.total == 400 * MIB
        driver.put("one")

    def test_metadata_grow_while_a_layer_is_mounted(self, driver):
        driver.create("one")
        path = Path(driver.get("one")) / "file"
        path.write_bytes(b"kept" * 100_000)
        driver.devices.resize_pool(400 * MIB, metadata_size=300 * MIB)
        status = driver.devices.status()
        assert (status.data.total, status.metadata.total) == (400 * MIB, 300 * MIB)
        assert path.read_bytes() == b"kept" * 100_000
        driver.create("two", "one")
        driver.put("one")

    def test_loop_files_grow_at_a_start_with_larger_options(self, driver):
        driver.create("one")
        larger = ("dm.loopdatasize=400M", "dm.loopmetadatasize=300M")
        with self.open(driver.home, *larger) as again:  # its pool is active
            status = again.devices.status()
            assert (status.data.total, status.metadata.total) == (400 * MIB, 300 * MIB)
        driver.cleanup()
        with self.open(driver.home, "dm.loopdatasize=500M") as again:
            assert again.devices.status().data.total == 500 * MIB
            again.cleanup()

    def test_a_graph_on_devices_of_the_users_own(self, tmp_path):
        files = [tmp_path / name for name in ("data", "metadata")]
        for file, size in zip(files, (300 * MIB, 200 * MIB), strict=True):
            file.touch()
            os.truncate(file, size)
        home = tmp_path / "graph"
        with loop.attached(files[0]) as data, loop.attached(files[1]) as metadata:
            options = (f"dm.datadev={data}", f"dm.metadatadev={metadata}")
            with self.open(home, *options) as driver:
                driver.create("one")
                (Path(driver.get("one")) / "file").write_text("kept")
                for file in files:
                    os.truncate(file, 400 * MIB)
                loop.set_capacity(data)
                loop.set_capacity(metadata)
                driver.devices.resize_pool()
                status = driver.devices.status()
                assert (status.data.total, status.metadata.total) == (400 * MIB, 400 * MIB)
                assert (status.data_loopback, status.metadata_loopback) == ("", "")
                driver.put("one")
                driver.cleanup()
            # As after a reboot: nothing is active
            with self.open(home, *options) as driver:
                assert (Path(driver.get("one")) / "file").read_text() == "kept"
                assert driver.devices.status().data.total == 400 * MIB
                driver.put("one")
                driver.cleanup()
            with pytest.raises(PoolMismatch, match="does not exist"):
                self.open(home)
        assert not (home / "devicemapper").exists()

    def test_the_home_is_private_from_the_first_mount_to_the_end(self, driver):
        driver.create("one")
        assert not mount.is_mount_point(driver.home)
        driver.get("one")
        (entry,) = [m for m in mount.mountinfo() if m.mount_point == driver.home]
        assert entry.optional == ()
        driver.create("two")
        driver.get("two")
        driver.put("one")
        assert devmapper.mounted(driver.home / "mnt" / "two")
        driver.close()
        assert mount.is_mount_point(driver.home)
        with self.open(driver.home) as other:
            assert other.devices.is_mounted("two")
            other.put("two")
        assert not mount.is_mount_point(driver.home)
        self.open(driver.home).cleanup()

    def test_a_home_that_the_user_mounted_stays_mounted(self, tmp_path):
        source = tmp_path / "source"
        home = tmp_path / "graph"
        source.mkdir()
        home.mkdir()
        mount.mount(source, home, None, flags=mount.MountFlag.BIND)
        try:
            driver = self.open(home)
            driver.create("one")
            driver.get("one")
            driver.put("one")
            driver.cleanup()
            assert mount.is_mount_point(home)
            assert (source / "metadata" / "one").exists()
        finally:
            mount.unmount(home)

    def test_a_device_that_is_still_open_is_removed_when_it_is_closed(self, home):
        driver = self.open(home, "dm.use_deferred_removal=true")
        try:
            driver.create("one")
            driver.get("one")
            node = driver.devices.device_path("one")
            assert node is not None
            with node.open("rb"):
                driver.put("one")
                name = driver.devices.dev_info("one").name()
                info = driver.devices.pool.info(name)
                assert info is not None
                assert info.state is Activation.LEAVING
                driver.get("one")
                info = driver.devices.pool.info(name)
                assert info is not None
                assert info.state is Activation.ACTIVE
                driver.put("one")
            wait_for(lambda: not driver.devices.has_activated_device("one"))
        finally:
            clean_up(driver)

    def test_many_processes_work_on_one_graph(self, driver, home):
        """Each makes, mounts, fills and deletes layers of its own, on the same parent."""
        driver.create("parent")
        driver.get("parent")
        workers = [
            subprocess.Popen([sys.executable, "-c", WORKER, str(home), f"w{number}", *GRAPH])
            for number in range(3)
        ]
        assert [worker.wait(60) for worker in workers] == [0, 0, 0]
        driver.put("parent")
        assert driver.layers() == sorted(
            ["parent", *(f"w{n}-{i}" for n in range(3) for i in (0, 2))]
        )
        for number in range(3):
            root = Path(driver.get(f"w{number}-2"))
            assert (root / "f").read_text() == f"w{number}-2"
            driver.put(f"w{number}-2")
        assert list(driver.devices.inconsistencies()) == []

    def test_cleanup_names_who_keeps_it_from_ending(self, driver):
        driver.create("one")
        root = Path(driver.get("one"))
        with (root / "f").open("w"), pytest.raises(LayerBusy) as caught:
            driver.cleanup()
        assert str(os.getpid()) in str(caught.value)
        assert devmapper.mounted(root.parent)
        driver.put("one")

    def test_a_device_set_mounts_where_it_is_told(self, driver, tmp_path):
        devices = driver.devices
        place = tmp_path / "elsewhere"
        place.mkdir()
        devices.add_device("one", "")
        devices.mount_device("one", place)
        devices.mount_device("one", place)
        with pytest.raises(LayerBusy, match="elsewhere"):
            driver.get("one")
        devices.unmount_device("one")
        assert devmapper.mounted(place)
        devices.unmount_device("one")
        assert not devmapper.mounted(place)
