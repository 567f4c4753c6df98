"""What snapshots do on every engine: `SnapshotsSuite` is given an engine.

containerd's own suite runs over gRPC (tests/suites); this one asks what that one does not: records,
devices, sizes, usage, crashes of the process that knows all names, and what others do meanwhile.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from devmapper.driver import Driver
from devmapper.errors import (
    LayerBusy,
    PoolFull,
    SnapshotExists,
    SnapshotNotFound,
    SnapshotStateError,
    UsageError,
)
from devmapper.linux import mount as mounts
from devmapper.linux.fs_geometry import geometry
from devmapper.linux.mount import MountFlag
from devmapper.snapshots import Info, Kind, Mount, Snapshots
from devmapper.units import MIB
from tests.conformance.graphdriver_base import GraphDriverBase

MAX_SIZE = "containerd.io/snapshot/max-size"


@contextmanager
def mounted(found: tuple[Mount, ...], where: Path) -> Iterator[Path]:
    """What containerd does with the answer of Prepare."""
    (only,) = found
    where.mkdir(exist_ok=True)
    flags = MountFlag.RDONLY if "ro" in only.options else MountFlag(0)
    data = ",".join(option for option in only.options if option not in ("ro", "rw"))
    mounts.mount(Path(only.source), where, only.type, flags=flags, data=data)
    try:
        yield where
    finally:
        mounts.unmount(where)


class SnapshotsSuite(GraphDriverBase):
    @pytest.fixture
    def snapshots(self, driver: Driver) -> Snapshots:
        return Snapshots(driver.devices)

    def commit_file(
        self, snapshots: Snapshots, where: Path, name: str, parent: str = "", size: int = 5
    ) -> None:
        """A committed snapshot with a file of its own name and size."""
        with mounted(snapshots.prepare(f"{name}-key", parent), where) as top:
            (top / name).write_bytes(os.urandom(size))
        snapshots.commit(name, f"{name}-key")

    def test_a_chain(self, snapshots, tmp_path):
        for name, parent in (("a", ""), ("b", "a"), ("c", "b")):
            self.commit_file(snapshots, tmp_path / "m", name, parent)
        with mounted(snapshots.view("v", "c"), tmp_path / "m") as top:
            assert sorted(os.listdir(top)) == ["a", "b", "c"]
            with pytest.raises(OSError, match="Read-only"):
                (top / "x").touch()
        with mounted(snapshots.view("w", "a"), tmp_path / "m") as top:
            assert os.listdir(top) == ["a"]
        kinds = {info.name: (info.kind, info.parent) for info in snapshots.walk()}
        assert kinds == {
            "a": (Kind.COMMITTED, ""),
            "b": (Kind.COMMITTED, "a"),
            "c": (Kind.COMMITTED, "b"),
            "v": (Kind.VIEW, "c"),
            "w": (Kind.VIEW, "a"),
        }

    def test_an_empty_snapshot_is_empty(self, snapshots, tmp_path):
        for found in (snapshots.prepare("k"), snapshots.view("v")):
            with mounted(found, tmp_path / "m") as top:
                assert os.listdir(top) == []
                assert top.stat().st_mode & 0o7777 == 0o755

    def test_committed_snapshots_are_inactive(self, driver, snapshots, tmp_path):
        self.commit_file(snapshots, tmp_path / "m", "a")
        assert driver.devices.pool.devices() == []
        (found,) = snapshots.prepare("k", "a")
        (device,) = driver.devices.pool.devices()
        assert str(device.path) == found.source
        snapshots.remove("k")
        assert driver.devices.pool.devices() == []

    def test_names_and_kinds(self, snapshots):
        snapshots.prepare("k")
        with pytest.raises(SnapshotExists):
            snapshots.prepare("k")
        with pytest.raises(SnapshotExists):
            snapshots.view("k")
        with pytest.raises(SnapshotNotFound, match="'nothing' does not exist"):
            snapshots.prepare("x", "nothing")
        with pytest.raises(UsageError, match="not a committed"):
            snapshots.prepare("x", "k")
        with pytest.raises(SnapshotNotFound):
            snapshots.commit("a", "nothing")
        snapshots.commit("a", "k")
        with pytest.raises(SnapshotNotFound):
            snapshots.stat("k")
        with pytest.raises(SnapshotStateError, match="committed"):
            snapshots.mounts("a")
        with pytest.raises(SnapshotStateError):
            snapshots.commit("b", "a")
        snapshots.view("v", "a")
        with pytest.raises(SnapshotStateError, match="a view"):
            snapshots.commit("b", "v")
        snapshots.prepare("k", "a")
        with pytest.raises(SnapshotExists):
            snapshots.commit("a", "k")
        with pytest.raises(SnapshotExists):
            snapshots.commit("k", "k")
        with pytest.raises(SnapshotStateError, match=r"cannot remove .* children"):
            snapshots.remove("a")
        for key in ("k", "v", "a"):
            snapshots.remove(key)
        assert list(snapshots.walk()) == []
        with pytest.raises(SnapshotNotFound):
            snapshots.remove("a")

    @pytest.mark.parametrize("key", ["", "a\0b", "\udcff", "x" * 4097])
    def test_keys_that_are_none(self, snapshots, key):
        calls: list[Callable[[], object]] = [
            lambda: snapshots.prepare(key),
            lambda: snapshots.stat(key),
            lambda: snapshots.remove(key),
            lambda: snapshots.commit(key, "k"),
            lambda: snapshots.mounts(key),
            lambda: snapshots.usage(key),
        ]
        for call in calls:
            with pytest.raises(UsageError):
                call()

    def test_keys_as_containerd_sends_them(self, snapshots):
        key = "k8s.io/17/extract-3 ../../sha256:" + "é" * 1000
        snapshots.prepare(key)
        snapshots.commit(key + "!", key)
        assert [info.name for info in snapshots.walk()] == [key + "!"]

    def test_times_and_labels(self, snapshots):
        before = time.time_ns()
        snapshots.prepare("k", labels={"a": "1", "empty": ""})
        made = snapshots.stat("k")
        assert before <= made.created == made.updated <= time.time_ns()
        assert made.labels == {"a": "1"}
        changed = snapshots.update("k", {"b": "2"}, ["labels.b"])
        assert changed.labels == {"a": "1", "b": "2"}
        assert changed.created == made.created < changed.updated
        assert snapshots.update("k", {}, ["labels.a"]).labels == {"b": "2"}
        assert snapshots.update("k", {"c": "3"}, ["labels"]).labels == {"c": "3"}
        assert snapshots.update("k", {"d": "4"}).labels == {"d": "4"}
        for field in ("name", "labels.", "created_at", ""):
            with pytest.raises(UsageError, match="cannot be changed"):
                snapshots.update("k", {"x": "y"}, [field])
        snapshots.commit("a", "k", {"e": "5"})
        committed = snapshots.stat("a")
        assert committed.labels == {"e": "5"}
        assert committed.created == committed.updated > changed.updated
        assert committed in list(snapshots.walk())

    def test_labels_that_are_too_many(self, snapshots):
        with pytest.raises(UsageError, match="bytes, expected at most"):
            snapshots.prepare("k", labels={"x": "y" * 600_000})
        assert list(snapshots.walk()) == []

    def test_everything_is_in_the_records(self, driver, home, snapshots, tmp_path):
        """A daemon that is killed knows the same afterwards; nothing else was written down."""
        self.commit_file(snapshots, tmp_path / "m", "a")
        snapshots.prepare("k", "a", {"x": "ü"})
        before: list[Info] = list(snapshots.walk())
        files = {path.name for path in home.iterdir()}
        assert files <= {"devicemapper", "metadata", "mnt", "lock"}
        with self.open(home) as again:
            second = Snapshots(again.devices)
            assert list(second.walk()) == before
            with pytest.raises(SnapshotStateError):
                second.remove("a")
            with mounted(second.mounts("k"), tmp_path / "m") as top:
                assert os.listdir(top) == ["a"]
            second.remove("k")
        snapshots.close()

    def test_after_a_restart_of_the_pool(self, driver, home, snapshots, tmp_path):
        """C8: an active snapshot has mounts again, whatever became of its device."""
        self.commit_file(snapshots, tmp_path / "m", "a")
        snapshots.prepare("k", "a")
        driver.cleanup()
        with self.open(home) as again:
            second = Snapshots(again.devices)
            with mounted(second.mounts("k"), tmp_path / "m") as top:
                assert os.listdir(top) == ["a"]
            again.cleanup()

    def test_a_size_of_its_own(self, driver, snapshots, tmp_path):
        self.commit_file(snapshots, tmp_path / "m", "a")
        (found,) = snapshots.prepare("k", "a", {MAX_SIZE: "400MiB"})
        assert geometry(Path(found.source)).size == 400 * MIB
        with mounted((found,), tmp_path / "m") as top:
            free = os.statvfs(top)
            assert free.f_blocks * free.f_frsize > 350 * MIB
        snapshots.commit("b", "k")
        (child,) = snapshots.prepare("l", "b")
        assert geometry(Path(child.source)).size == 400 * MIB
        with pytest.raises(UsageError, match="smaller than its parent"):
            snapshots.prepare("m", "b", {MAX_SIZE: "300MiB"})
        with pytest.raises(UsageError, match="expected a size"):
            snapshots.prepare("m", "b", {MAX_SIZE: "much"})
        assert [info.name for info in snapshots.walk()] == ["a", "b", "l"]
        assert not driver.devices.inconsistencies()

    def test_usage(self, snapshots, tmp_path):
        self.commit_file(snapshots, tmp_path / "m", "a", size=4 * MIB)
        used = snapshots.usage("a")
        assert 4 * MIB <= used.size < 16 * MIB
        assert used.inodes == 1
        assert snapshots.usage("a") == used
        with mounted(snapshots.prepare("k", "a"), tmp_path / "m") as top:
            for number in range(7):
                (top / str(number)).touch()
            os.sync()
            assert snapshots.usage("k").inodes == 7
            with (top / "a").open("r+b") as file:
                file.write(os.urandom(4 * MIB))  # overwritten, not added
            os.sync()
            assert snapshots.usage("k").size >= 4 * MIB
        snapshots.commit("b", "k")
        assert snapshots.usage("b").inodes == 7
        assert snapshots.usage("b").size >= 4 * MIB
        snapshots.view("v", "b")  # C2: never less than nothing
        assert snapshots.usage("v") == (0, 0)

    def test_commit_while_it_is_mounted(self, snapshots, tmp_path):
        """containerd does not, others may: what was written before is in the snapshot."""
        with mounted(snapshots.prepare("k"), tmp_path / "m") as top:
            (top / "f").write_text("written")
            snapshots.commit("a", "k")
        with mounted(snapshots.view("v", "a"), tmp_path / "n") as top:
            assert (top / "f").read_text() == "written"

    def test_a_mounted_snapshot_is_not_removed(self, driver, snapshots, tmp_path):
        with mounted(snapshots.prepare("k"), tmp_path / "m"):
            with pytest.raises(LayerBusy, match=r"'k' is busy: held by .*m"):
                snapshots.remove("k")
            assert snapshots.stat("k").kind is Kind.ACTIVE
        snapshots.remove("k")
        assert not driver.devices.inconsistencies()

    def test_what_another_process_removed(self, driver, home, snapshots):
        snapshots.prepare("k")
        layer = next(
            layer
            for layer in driver.layers()
            if layer.startswith("snapshot-") and "root" not in layer
        )
        with self.open(home) as other:
            other.remove(layer)
        with pytest.raises(SnapshotNotFound, match="'k'"):
            snapshots.commit("a", "k")
        snapshots.prepare("k")

    def test_docker_s_layers_are_no_snapshots(self, driver, snapshots, home):
        driver.create("web", owner="docker")
        snapshots.prepare("k")
        assert [info.name for info in snapshots.walk()] == ["k"]
        record = json.loads((home / "metadata" / "web").read_text())
        assert record["owner"] == "docker"
        assert max(driver.layers()) == "web"

    def test_a_record_that_is_damaged_does_not_keep_the_others(self, driver, snapshots, home):
        snapshots.prepare("k")
        snapshots.prepare("l")
        victim = next(
            path for path in (home / "metadata").iterdir() if '"key":"l"' in path.read_text()
        )
        victim.write_text(victim.read_text().replace('"kind":"active"', '"kind":"odd"'))
        assert [info.name for info in Snapshots(driver.devices).walk()] == ["k"]

    def test_a_full_pool_leaves_nothing(self, driver, home, snapshots, tmp_path):
        self.commit_file(snapshots, tmp_path / "m", "a", size=200 * MIB)
        driver.close()
        with self.open(home, "dm.min_free_space=90%") as full:
            second = Snapshots(full.devices)
            with pytest.raises(PoolFull):
                second.prepare("k", "a")
            assert [info.name for info in second.walk()] == ["a"]
            assert not full.devices.inconsistencies()
            second.remove("a")
            second.prepare("k")
            full.cleanup()

    def test_many_at_once(self, driver, snapshots, tmp_path):
        """Parallel calls on the same names: each succeeds once."""
        self.commit_file(snapshots, tmp_path / "m", "base")
        start = threading.Barrier(8)
        won: list[str] = []

        def work(number: int) -> None:
            start.wait()
            for turn in range(4):
                try:
                    snapshots.prepare(f"k{turn}", "base")
                    won.append(f"k{turn}")
                except SnapshotExists:
                    pass
                own = f"own-{number}-{turn}"
                snapshots.prepare(own, "base")
                snapshots.commit(f"{own}-c", own)
                if turn % 2:
                    snapshots.remove(f"{own}-c")

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, number) for number in range(8)]:
                done.result()
        assert sorted(won) == ["k0", "k1", "k2", "k3"]
        names = [info.name for info in snapshots.walk()]
        assert len(names) == len(set(names)) == 1 + 4 + 16
        assert not driver.devices.inconsistencies()
