"""Changes come one by one: in the order of a sorted list, in memory that trees do not grow.

The reference is a list of everything that both trees hold, compared by paths.
"""

import io
import itertools
import os
import shutil
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devmapper.layerdiff import changes as changes_module
from devmapper.layerdiff.archive import write_diff
from devmapper.layerdiff.changes import Change, Kind, changes, compared, diff_size
from devmapper.layerdiff.inode_ranges import InodeRange, InodeSet
from tests.unit.t1_changes import put

# Bytes before and after the slash, no UTF-8, and characters whose UTF-16 sorts otherwise
PIECES = [
    b"a",
    b"b",
    b"-",
    b".",
    b"!",
    b"0",
    b"\xff",
    "é".encode(),
    "🐳".encode(),
    "\uff5e".encode(),
]
NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map(b"".join)
NAMES = NAMES.filter(lambda name: name not in (b".", b".."))
FILES = st.integers(0, 2)
TREES = st.recursive(
    st.dictionaries(NAMES, FILES, max_size=4),
    lambda below: st.dictionaries(NAMES, FILES | below, max_size=5),
    max_leaves=12,
)
Tree = dict[bytes, "int | Tree"]


@st.composite
def pairs(draw):
    """Two trees that have much in common."""
    tree = draw(TREES)

    def edited(tree: Tree) -> Tree:
        found: Tree = {}
        for name, what in tree.items():
            fate = draw(st.integers(0, 7))
            if fate == 0:
                continue
            if fate == 1:
                what = draw(FILES) if isinstance(what, dict) else draw(TREES)
            elif isinstance(what, dict):
                what = edited(what)
            elif fate == 2:
                what = draw(FILES)
            found[name] = what
        if draw(st.integers(0, 3)) == 0:
            found[draw(NAMES)] = draw(FILES | TREES)
        return found

    return edited(tree), tree


def plant(root: bytes, tree: Tree) -> None:
    os.mkdir(root)
    for name, what in tree.items():
        path = os.path.join(root, name)
        if isinstance(what, dict):
            plant(path, what)
            continue
        with open(path, "wb") as file:
            file.write(b"x" * what)
        os.utime(path, ns=(0, 0))


def flat(tree: Tree, prefix: bytes = b"") -> dict[bytes, "int | None"]:
    """By path; None for a directory."""
    found: dict[bytes, int | None] = {}
    for name, what in tree.items():
        path = prefix + b"/" + name
        found[path] = None if isinstance(what, dict) else what
        if isinstance(what, dict):
            found |= flat(what, path)
    return found


def reference(new_tree: Tree, old_tree: Tree) -> list[Change]:
    new, old = flat(new_tree), flat(old_tree)
    found: dict[bytes, Kind] = {}
    for path, what in new.items():
        if path not in old:
            found[path] = Kind.ADD
        elif what != old[path]:
            found[path] = Kind.MODIFY
    for path in old.keys() - new.keys():
        above = os.path.dirname(path)
        if above == b"/" or new.get(above, 0) is None:  # else it went with what is above it
            found[path] = Kind.DELETE
    for path in list(found):
        while (path := os.path.dirname(path)) != b"/":
            found.setdefault(path, Kind.MODIFY)
    return [Change(os.fsdecode(path), found[path]) for path in sorted(found)]


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_the_order_and_the_changes_are_those_of_a_sorted_list(pair):
    new, old = pair
    with tempfile.TemporaryDirectory() as directory:
        for name, tree in (("new", new), ("old", old)):
            plant(os.fsencode(directory) + b"/" + name.encode(), tree)
        found = changes(Path(directory) / "new", Path(directory) / "old")
    assert found == reference(new, old)


def test_a_directory_is_listed_before_names_that_sort_between_it_and_what_is_in_it(tmp_path):
    for side in ("old", "new"):
        for name in ("lib/deep/er/file", "lib-old/file", "lib.d/x", "lib-none/quiet", "lib/same/q"):
            put(tmp_path / side / name)
    put(tmp_path / "new/lib-old/file", b"more")
    put(tmp_path / "new/lib.d/x", b"more")
    listed = [change.path for change in changes(tmp_path / "new", tmp_path / "old")]
    assert listed == ["/lib-old", "/lib-old/file", "/lib.d", "/lib.d/x"]
    put(tmp_path / "new/lib/deep/er/file", b"more")
    listed = [change.path for change in changes(tmp_path / "new", tmp_path / "old")]
    assert listed == [
        "/lib", "/lib-old", "/lib-old/file", "/lib.d", "/lib.d/x",
        "/lib/deep", "/lib/deep/er", "/lib/deep/er/file",
    ]  # fmt: skip


@pytest.mark.parametrize("most_known", [1 << 14, 3])
def test_no_directory_is_searched_again_and_again(tmp_path, monkeypatch, most_known):
    """Each level has to be searched for a change that only the lowest one has."""
    levels, quiet = 40, 5
    here = tmp_path
    for side in ("old", "newer"):
        here = tmp_path / side
        for _ in range(levels):
            for each in range(quiet):
                put(here / f"b{each}/x/file")
            put(here / "d-/x/file", side.encode())
            here = here / "d"
        put(here / "file")
    put(here / "file", b"more")
    looked = itertools.count()
    compare = changes_module._Trees.compare

    def counted(trees, here):
        next(looked)
        return compare(trees, here)

    monkeypatch.setattr(changes_module._Trees, "compare", counted)
    monkeypatch.setattr(changes_module, "_MOST_KNOWN", most_known)
    found = changes(tmp_path / "newer", tmp_path / "old")
    assert [change.path for change in found] == sorted(change.path for change in found)
    assert len(found) == 4 * levels + 1
    directories = levels * (2 * quiet + 3) + 1
    if most_known > directories:
        assert next(looked) <= 3 * directories


@contextmanager
def traced_peak():
    """What was allocated at most meanwhile, in bytes, in a list."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


class Nowhere(io.BytesIO):
    def write(self, data):
        return len(data)


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """Two trees, the second with four times as many files: new, old, all of them modified."""
    root = tmp_path_factory.mktemp("growing")
    for name, directories in (("one", 20), ("four", 80)):
        for side in ("old", "new"):
            for number in range(directories):
                for file in range(50):
                    put(root / name / side / f"d{number % 8}" / f"s{number}" / f"f{file}")
                    if side == "new":
                        os.utime(root / name / side / f"d{number % 8}/s{number}/f{file}", (1, 1))
    yield root
    shutil.rmtree(root)


CONSUMERS = {
    "changes": lambda root, found: sum(1 for _ in found),
    "tar": lambda root, found: write_diff(root, found, Nowhere()),
    "size": diff_size,
}


@pytest.mark.parametrize("consume", CONSUMERS.values(), ids=CONSUMERS)
@pytest.mark.parametrize("against", ["old", "nothing", "itself by inodes"])
def test_memory_does_not_grow_with_the_number_of_files(growing, against, consume):
    peaks = []
    for name in ("one", "one", "four"):  # the first time fills caches of the interpreter
        new = growing / name / "new"
        old = {"old": growing / name / "old", "nothing": None}.get(against, new)
        suspects = InodeSet([InodeRange(0, 1)]) if against == "itself by inodes" else None
        with traced_peak() as peak, compared(new, old, suspects=suspects) as found:
            consume(new, found)
        peaks += peak
    # A list of changes takes some 225 bytes for each of the 3,000 further files
    assert peaks[2] - peaks[1] < 100_000


def test_a_directory_that_vanishes_while_it_is_told_is_left_out(tmp_path, caplog):
    for name in ("a/x", "b/c/x", "d/x"):
        put(tmp_path / "tree" / name)
    with compared(tmp_path / "tree", None) as found:
        told = [next(found).path]
        shutil.rmtree(tmp_path / "tree/b")
        told += [change.path for change in found]
    assert told == ["/a", "/a/x", "/b", "/d", "/d/x"]
    assert "'b' has vanished" in caplog.text
