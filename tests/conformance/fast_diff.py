"""Only changed blocks are looked at, and the result is the same: cases for both engines.

Each case edits layers at random and compares what the driver says with the walk of both trees.
"""

import io
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from devmapper.deviceset import delta
from devmapper.driver import Driver
from devmapper.layerdiff import changes as changes_module
from devmapper.layerdiff import difference, unchanged
from devmapper.layerdiff.archive import write_diff
from devmapper.layerdiff.changes import Change, changes
from devmapper.layerdiff.descent import Cursor
from devmapper.linux import mount, process
from tests.conformance.graphdriver_base import GraphDriverBase, clean_up

if TYPE_CHECKING:
    from devmapper.layerdiff.inode_ranges import InodeSet

SECOND = 1_000_000_000


class Looks:
    """How often the walks asked for the status of a name, and whether the fast one was chosen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statuses = 0
        self.sets: list[InodeSet | None] = []
        status, find = difference.status_of, unchanged.changed_inodes

        def counted(name: str, cursor: Cursor) -> os.stat_result | None:
            self.statuses += 1
            return status(name, cursor)

        def noted(*args: Any) -> Any:
            self.sets.append(find(*args))
            return self.sets[-1]

        monkeypatch.setattr(changes_module, "status_of", counted)
        monkeypatch.setattr(unchanged, "changed_inodes", noted)
        monkeypatch.setattr(delta, "FEWEST_INODES", 0)


class Editor:
    """Random changes of a tree, of every kind that a program can make."""

    def __init__(self, root: Path, chooser: random.Random) -> None:
        self._root = root
        self._chooser = chooser

    def run(self, count: int) -> None:
        for _ in range(count):
            operation = self._chooser.choice(OPERATIONS)
            with suppress(OSError):  # a directory into itself, a name that is taken
                operation(self)

    def _paths(self) -> list[Path]:
        return sorted(self._root.rglob("*"))

    def _any(self) -> Path:
        return self._chooser.choice(self._paths())

    def _directory(self) -> Path:
        found = [p for p in self._paths() if p.is_dir() and not p.is_symlink()]
        return self._chooser.choice([self._root, *found])

    def _file(self) -> Path:
        return self._chooser.choice(
            [p for p in self._paths() if p.is_file() and not p.is_symlink()]
        )

    def _fresh(self) -> Path:
        return self._directory() / f"n{self._chooser.randrange(40)}"

    def create(self) -> None:
        self._fresh().write_bytes(self._chooser.randbytes(self._chooser.choice((0, 9, 70_000))))

    def overwrite(self) -> None:
        with self._file().open("r+b") as file:
            file.write(b"%d" % self._chooser.randrange(1000))

    def overwrite_in_secret(self) -> None:
        """The same size and time: no change, by Docker's rules."""
        path = self._file()
        before = path.stat()
        with path.open("r+b") as file:
            file.write(b"z" * min(5, before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def truncate(self) -> None:
        os.truncate(self._file(), self._chooser.choice((0, 1, 100_000)))

    def mode(self) -> None:
        self._file().chmod(self._chooser.choice((0o600, 0o644, 0o4755)))

    def owner(self) -> None:
        os.lchown(self._any(), self._chooser.randrange(3), self._chooser.randrange(3))

    def attribute(self) -> None:
        size = self._chooser.choice((3, 300, 2000))
        os.setxattr(self._any(), "user.test", b"a" * size, follow_symlinks=True)

    def no_attribute(self) -> None:
        os.removexattr(self._any(), "user.test")

    def time(self) -> None:
        when = self._chooser.choice((0, 1_600_000_000)) * SECOND
        os.utime(self._any(), ns=(when, when), follow_symlinks=False)

    def rename(self) -> None:
        self._any().rename(self._fresh())

    def swap(self) -> None:
        one, other, between = self._any(), self._any(), self._root / "between"
        one.rename(between)
        other.rename(one)
        between.rename(other)

    def link(self) -> None:
        self._fresh().hardlink_to(self._file())

    def unlink(self) -> None:
        self._file().unlink()

    def unlink_and_create_again(self) -> None:
        """Mostly with the same inode number."""
        path = self._file()
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)

    def remove(self) -> None:
        path = self._directory()
        if path != self._root:
            process.run(["rm", "-r", str(path)])

    def directory(self) -> None:
        self._fresh().mkdir()

    def become_directory(self) -> None:
        path = self._file()
        path.unlink()
        path.mkdir()
        (path / "below").write_text("x")

    def symlink(self) -> None:
        self._fresh().symlink_to(self._chooser.choice(("short", "long" * 100)))

    def same_length_symlink(self) -> None:
        path = self._chooser.choice([p for p in self._paths() if p.is_symlink()])
        before = os.lstat(path)
        target = os.readlink(path)
        path.unlink()
        path.symlink_to(target[:-1] + "X")
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns), follow_symlinks=False)

    def node(self) -> None:
        os.mknod(self._fresh(), 0o020600, os.makedev(1, self._chooser.randrange(9)))

    def fifo(self) -> None:
        os.mkfifo(self._fresh())


OPERATIONS = [value for name, value in vars(Editor).items() if name[0] != "_" and name != "run"]


def plant(root: Path, directories: int = 8, files: int = 40) -> None:
    for d in range(directories):
        for path in (root / f"d{d}", root / f"d{d}" / "sub"):
            path.mkdir()
            for f in range(files // 2):
                (path / f"f{f}").write_bytes(b"%d" % f * f)
        (root / f"d{d}" / "link").symlink_to("x" * (5 + 60 * (d % 2)))
        (root / f"d{d}" / "hard").hardlink_to(root / f"d{d}" / "f1")


@contextmanager
def mounted(driver: Driver, *layers: str) -> Iterator[list[Path]]:
    roots = [Path(driver.get(layer)) for layer in layers]
    try:
        yield roots
    finally:
        for layer in layers:
            driver.put(layer)


def naive(driver: Driver, new: str, old: str) -> tuple[list[Change], bytes]:
    with mounted(driver, new, old) as (one, other):
        found = changes(one, other)
        out = io.BytesIO()
        write_diff(one, found, out)
        return found, out.getvalue()


def may_grow_mounted() -> bool:
    """Where it may not, ext4 grows with e2fsck, which leaves its mark: then both trees are walked.

    That is CAP_SYS_RESOURCE.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) & 1 << 24)


def check(driver: Driver, looks: Looks, new: str, old: str) -> None:
    """The driver's answers are those of the walk of both trees, and it did not walk them."""
    expected, archive = naive(driver, new, old)
    looks.sets.clear()
    assert driver.changes(new, old) == expected
    sizes = {driver.devices.dev_info(layer).size for layer in (new, old)}
    is_ext4 = driver.devices.options.file_system == "ext4"
    assert len(looks.sets) == 1
    if len(sizes) == 1 or not is_ext4 or may_grow_mounted():
        assert looks.sets[0] is not None
    out = io.BytesIO()
    driver.write_diff(new, old, out)
    assert out.getvalue() == archive


class FastDiffCases(GraphDriverBase):
    """Cases for `GraphDriverSuite`."""

    @pytest.fixture
    def looks(self, monkeypatch):
        return Looks(monkeypatch)

    @pytest.fixture(params=["ext4", "xfs"])
    def planted(self, request, home):
        driver = self.open(home, f"dm.fs={request.param}", "dm.loopdatasize=1G")
        try:
            driver.create("parent")
            with mounted(driver, "parent") as (root,):
                plant(root)
            yield driver
        finally:
            clean_up(driver)

    @pytest.mark.parametrize("seed", range(6))
    def test_fast_and_naive_changes_are_equal(self, planted, looks, seed):
        driver, chooser = planted, random.Random(seed)
        driver.create("child", "parent")
        driver.create("sibling", "parent", storage_opt={"size": "500M"} if seed % 2 else None)
        for layer, count in (("child", 3 * seed + 1), ("sibling", 12)):
            with mounted(driver, layer) as (root,):
                Editor(root, chooser).run(count)
        driver.create("grandchild", "child", storage_opt={"size": "600M"} if seed > 3 else None)
        with mounted(driver, "grandchild") as (root,):
            Editor(root, chooser).run(10)
        pairs = [
            ("child", "parent"),
            ("grandchild", "parent"),
            ("grandchild", "child"),
            ("parent", "grandchild"),
            ("grandchild", "sibling"),
            ("sibling", "child"),
        ]
        for new, old in pairs:
            check(driver, looks, new, old)

    def test_what_was_written_a_moment_ago_is_seen(self, planted, looks):
        """Nothing of it has reached the device yet; the layers stay mounted all the time."""
        driver, chooser = planted, random.Random(11)
        driver.create("child", "parent")
        with mounted(driver, "child", "parent") as (child, parent):
            for _ in range(12):
                Editor(child, chooser).run(2)
                Editor(parent, chooser).run(1)
                found = driver.changes("child", "parent")
                assert found == changes(child, parent)
        assert None not in looks.sets

    def test_few_files_are_looked_at(self, planted, looks):
        driver = planted
        with mounted(driver, "parent") as (root,):
            for d in range(20):
                (root / f"many{d}").mkdir()
                for f in range(100):
                    (root / f"many{d}" / str(f)).write_text("x")
        driver.create("child", "parent")
        with mounted(driver, "child") as (root,):
            (root / "many7" / "50").write_text("changed")
        looks.statuses = 0
        assert [c.path for c in driver.changes("child", "parent")] == ["/many7", "/many7/50"]
        assert looks.statuses < 1200  # of 4,700 in the two trees

    def test_a_mount_inside_of_a_layer_is_walked(self, planted, looks, tmp_path):
        driver = planted
        driver.create("child", "parent")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "f1").write_text("elsewhere")
        with mounted(driver, "child", "parent") as (child, parent):
            process.run(["mount", "--bind", str(tmp_path / "other"), str(child / "d1" / "sub")])
            try:
                found = driver.changes("child", "parent")
                assert found == changes(child, parent)
            finally:
                mount.unmount(child / "d1" / "sub")
        assert "/d1/sub/f1" in [change.path for change in found]
        assert looks.sets == [None]

    def test_a_kill_amid_a_difference_leaves_nothing_suspended(self, planted):
        driver = planted
        driver.create("child", "parent")
        with mounted(driver, "child", "parent") as (child, _):
            for moment in (0.05, 0.1, 0.2, 0.3):
                code = KILLED.format(engine=type(self.make_engine()), home=str(driver.home))
                victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
                assert victim.stdout is not None
                victim.stdout.readline()
                with suppress(subprocess.TimeoutExpired):
                    victim.wait(moment)
                victim.kill()
                victim.wait()
                victim.stdout.close()
                # In the kernel the next one that comes resumes it
                driver.changes("child", "parent")
                (child / f"after-{moment}").write_text("it goes on")
                os.sync()


KILLED = """
import devmapper, sys
from devmapper.deviceset import delta
from devmapper.engine.select import choose_engine
delta.FEWEST_INODES = 0
kind = "kernel" if "Kernel" in "{engine}" else "embedded"
driver = devmapper.init("{home}", ("dm.override_udev_sync_check=true",), engine=kind)
print("ready", flush=True)
while True:
    driver.devices.delta("child", "parent")
"""
