"""Only changed blocks are looked at, and the result is that of the walk of both trees: always.

Scripts of edits are made up and, where one fails, shrunk by hypothesis, and are done to real layers
of one graph on the embedded engine: layers on layers and beside each other, edited once more after
layers were made of them, mounted or not, or with a journal that is still to be replayed.
`DIFF_EXAMPLES` says how many scripts there are.
"""

import io
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import devmapper
from devmapper.deviceset import delta
from devmapper.driver import Driver
from devmapper.layerdiff import unchanged
from devmapper.layerdiff.archive import write_diff
from devmapper.layerdiff.changes import changes
from devmapper.linux import mount
from tests.conformance.graphdriver_base import GRAPH, clean_up
from tests.support.fs_shutdown import shut_down
from tests.support.tree_edits import OPERATIONS, Edit, apply_edits

if TYPE_CHECKING:
    from devmapper.layerdiff.inode_ranges import InodeSet

EXAMPLES: Final = int(os.environ.get("DIFF_EXAMPLES", "5"))  # hundreds are a soak
# Blocks of 4 KiB as layers mostly have them: mkfs gives a small ext4 blocks of 1 KiB
FILE_SYSTEMS: Final = {"ext4": ("dm.fs=ext4", "dm.mkfsarg=-b4096"), "xfs": ("dm.fs=xfs",)}

# What fails is shrunk, for five minutes at most
pytestmark = [
    pytest.mark.root,
    pytest.mark.fuse,
    pytest.mark.timeout(max(900, 10 * EXAMPLES)),
]


class Ending(StrEnum):
    """What becomes of a layer after its edits."""

    UNMOUNTED = "unmounted"
    MOUNTED = "mounted"
    JOURNAL = "journal"  # as after a crash: changes that only the journal has
    JOURNAL_LOST = "journal lost"  # what was committed last only


class Stage(NamedTuple):
    """Edits of a layer: a new one on top of one that is there, or one that is there."""

    layer: int
    is_new: bool
    edits: list[Edit]
    ending: Ending


numbers = st.integers(0, 9) | st.integers(0, 400)
edits = st.builds(Edit, st.sampled_from(sorted(OPERATIONS)), numbers, numbers, st.integers(0, 11))
stages = st.builds(
    Stage,
    st.integers(0, 5),
    st.integers(0, 3).map(bool),
    st.lists(edits, max_size=25),
    st.sampled_from(Ending),
)


class Graph:
    """One graph for all scripts, with a layer that they begin with."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.found: list[InodeSet | None] = []  # what the fast way made of each comparison
        self._numbers = itertools.count()

    def new_layer(self, parent: str) -> str:
        layer = f"layer{next(self._numbers)}"
        self.driver.create(layer, parent)
        return layer


@pytest.fixture
def home(tmp_path):
    """In memory: a graph writes back and waits for the disk again and again."""
    with mount.mounted_at("tmpfs", tmp_path, "tmpfs", data="size=1g"):
        yield tmp_path / "graph"


@contextmanager
def opened_graph(home: Path, patch: pytest.MonkeyPatch, *options: str) -> Iterator[Graph]:
    driver = devmapper.init(home, (*GRAPH, "dm.loopdatasize=2G", *options), engine="embedded")
    graph = Graph(driver)
    find = unchanged.changed_inodes

    def noted(*args):
        graph.found.append(find(*args))
        return graph.found[-1]

    patch.setattr(unchanged, "changed_inodes", noted)
    patch.setattr(delta, "FEWEST_INODES", 0)
    try:
        driver.create("planted")
        root = driver.get("planted")
        try:
            plant(root)
        finally:
            driver.put("planted")
        yield graph
    finally:
        clean_up(driver)


def plant(root: str) -> None:
    """A little of everything."""
    for directory in ("a", "a/b", "a-b", "c", "c/d/e/f", "etc"):
        os.makedirs(f"{root}/{directory}")
        for number in range(12):
            Path(root, directory, f"f{number}").write_bytes(b"%d" % number * number * 10)
        os.symlink("x" * 5, f"{root}/{directory}/short")
        os.symlink("x" * 300, f"{root}/{directory}/long")
        os.link(f"{root}/{directory}/f1", f"{root}/{directory}/hard")
        os.link(f"{root}/{directory}/f2", f"{root}/hard_{directory.replace('/', '_')}")
        os.mknod(f"{root}/{directory}/null", 0o020600, os.makedev(1, 3))
        os.setxattr(f"{root}/{directory}/f3", "user.small", b"small")
        os.setxattr(f"{root}/{directory}/f4", "user.large", b"large" * 400)
        os.setxattr(f"{root}/{directory}", "user.directory", b"1")
    os.mkdir(f"{root}/many")
    for number in range(120):
        Path(root, "many", f"{number:03}" + "n" * 120).touch()
    with open(f"{root}/etc/sparse", "wb") as file:
        file.seek(1_000_000)
        file.write(b"behind a hole")


@pytest.fixture(params=FILE_SYSTEMS)
def graph(request, home, monkeypatch):
    with opened_graph(home, monkeypatch, *FILE_SYSTEMS[request.param]) as found:
        yield found


class Script:
    """Layers of one script; they go with it."""

    def __init__(self, graph: Graph, stack: ExitStack) -> None:
        self._driver = graph.driver
        self._graph = graph
        self._stack = stack
        self.layers = ["planted"]
        self.parents: dict[str, str] = {}

    def run(self, stage: Stage) -> None:
        if stage.is_new or len(self.layers) == 1:
            self._make(self.layers[stage.layer % len(self.layers)])
            layer = self.layers[-1]
        else:
            layer = self.layers[1 + stage.layer % (len(self.layers) - 1)]
        root = self._driver.get(layer)
        try:
            apply_edits(root, stage.edits)
            if stage.ending in (Ending.JOURNAL, Ending.JOURNAL_LOST):
                shut_down(root, has_log=stage.ending is Ending.JOURNAL)
        finally:
            if stage.ending is Ending.MOUNTED:
                self._stack.callback(self._driver.put, layer)
            else:
                self._driver.put(layer)

    def _make(self, parent: str) -> None:
        layer = self._graph.new_layer(parent)
        self._stack.callback(self._driver.remove, layer)
        self.layers.append(layer)
        self.parents[layer] = parent

    def pairs(self) -> list[tuple[str, str]]:
        """Each layer and its parent; the youngest and the eldest, either way; two cousins."""
        found = list(self.parents.items())
        if len(self.layers) > 2:
            youngest, before = self.layers[-1], self.layers[-2]
            found += [(youngest, "planted"), (self.layers[1], youngest), (before, youngest)]
        return list(dict.fromkeys(pair for pair in found if pair[0] != pair[1]))


@contextmanager
def script_on(graph: Graph) -> Iterator[Script]:
    with ExitStack() as stack:
        yield Script(graph, stack)


def check(graph: Graph, new: str, old: str, *, is_fast: bool = True) -> int:
    """The driver's answers are those of the walk of both trees, and it did not walk them.

    Unless it is not *is_fast*: then it has to.  Returns how many changes there are.
    """
    driver = graph.driver
    graph.found.clear()
    with ExitStack() as stack:
        roots = []
        for layer in (new, old):
            roots.append(Path(driver.get(layer)))
            stack.callback(driver.put, layer)
        fast, archive = driver.changes(new, old), io.BytesIO()
        driver.write_diff(new, old, archive)
        assert [found is not None for found in graph.found] == [is_fast] * 2
        naive, expected = changes(*roots), io.BytesIO()
        write_diff(roots[0], naive, expected)
    assert fast == naive
    assert archive.getvalue() == expected.getvalue()
    return len(fast)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
)
@given(script=st.lists(stages, min_size=1, max_size=4))
def test_fast_and_naive_changes_are_equal_whatever_was_done(graph, script):
    with script_on(graph) as done:
        for stage in script:
            done.run(stage)
        for new, old in done.pairs():
            event("changes" if check(graph, new, old) else "no change")


def test_each_edit(graph):
    """So that none is missed by chance; four kinds in each of layers that stand on one another."""
    with script_on(graph) as done:
        names, endings = sorted(OPERATIONS), itertools.cycle(Ending)
        for number in range(0, len(names), 4):
            several = [
                Edit(each, 7 * n, 5 * n, n) for each in names[number : number + 4] for n in range(5)
            ]
            done.run(Stage(len(done.layers) - 1, True, several, next(endings)))
            check(graph, done.layers[-1], done.layers[-2])


def test_inline_data_is_compared_in_full(home, monkeypatch):
    """Where content stands in inodes, ext4 is not known to us."""
    options = (*FILE_SYSTEMS["ext4"], "dm.mkfsarg=-Oinline_data", "dm.mkfsarg=-I256")
    with opened_graph(home, monkeypatch, *options) as graph, script_on(graph) as done:
        for number in range(2):
            several = [Edit(each, 3 * number, 2, number) for each in sorted(OPERATIONS)]
            done.run(Stage(number, True, several, Ending.UNMOUNTED))
            assert check(graph, done.layers[-1], done.layers[-2], is_fast=False)


def test_every_edit_can_be_done(tmp_path):
    """On a tree like that of the layers each of them does something."""
    for operation in OPERATIONS:
        root = tmp_path / operation
        root.mkdir()
        plant(str(root))
        assert apply_edits(str(root), [Edit(operation, 3 * n, 3 * n + 1, n) for n in range(12)])
