"""One pool in the hands of the kernel engine and of the embedded engine by turns."""

import os
import random
import signal
import subprocess
import sys
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Final

import pytest

import devmapper
from devmapper.driver import Driver
from devmapper.engine.select import Preference
from devmapper.errors import PoolBusy
from devmapper.units import MIB
from tests.support import layer_churn
from tests.support.command import Command
from tests.support.docker_graph import OPTIONS, Tree, assert_same, ours, tree
from tests.support.dockerd import remove_devices, unmount_below

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.fuse, pytest.mark.tools]

ENGINES: Final[tuple[Preference, ...]] = ("kernel", "embedded")
TURNS: Final = 5


@pytest.fixture
def home(disk):
    path = disk / "home"
    yield path
    unmount_below(path)
    remove_devices(path)


def change(root: Path, chance: random.Random) -> None:
    """Write, overwrite in the middle, cut off and remove files."""
    for number in range(4):
        path = root / f"file-{chance.randrange(12)}"
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(chance.randrange(MIB))
            file.write(chance.randbytes(chance.randrange(1, 300_000)))
        if number == 3:
            os.truncate(path, chance.randrange(MIB))
    if chance.random() < 0.5:
        chance.choice(sorted(root.glob("file-*"))).unlink()


def work(driver: Driver, turn: int, chance: random.Random, expected: dict[str, Tree]) -> None:
    """Change a layer while it is mounted, snapshot it in between, and remove an old snapshot."""
    root = Path(driver.get("work"))
    change(root, chance)
    driver.create(f"snapshot-{turn}", "work")
    change(root, chance)
    driver.put("work")
    expected["work"] = tree(driver, "work")
    expected[f"snapshot-{turn}"] = tree(driver, f"snapshot-{turn}")
    assert expected["work"] != expected[f"snapshot-{turn}"]
    if turn >= 3:
        driver.remove(f"snapshot-{turn - 3}")
        del expected[f"snapshot-{turn - 3}"]


@pytest.mark.parametrize("first", ENGINES)
def test_a_changed_layer_goes_from_engine_to_engine(home, first):
    chance = random.Random(3)
    expected: dict[str, Tree] = {}
    start = ENGINES.index(first)
    for turn, engine in enumerate(islice(cycle(ENGINES), start, start + TURNS)):
        with ours(home, engine) as driver:
            if turn == 0:
                driver.create("work")
            assert set(driver.layers()) - {"work"} == expected.keys() - {"work"}
            for layer, content in expected.items():
                assert_same(tree(driver, layer), content)
            work(driver, turn, chance, expected)


@pytest.mark.parametrize(("one", "other"), list(pairwise((*ENGINES, ENGINES[0]))))
def test_an_engine_keeps_off_what_the_other_has(home, one, other):
    with ours(home, one) as driver:
        driver.create("layer")
        root = Path(driver.get("layer"))
        (root / "file").write_text("kept")
        with pytest.raises(PoolBusy):
            devmapper.init(home, OPTIONS, engine=other)
        driver.put("layer")
    with ours(home, other) as driver:
        assert (Path(driver.get("layer")) / "file").read_text() == "kept"
        driver.put("layer")


@pytest.mark.parametrize(("one", "other"), list(pairwise((*ENGINES, ENGINES[0]))))
def test_what_a_killed_process_left_is_stopped_and_handed_over(home, one, other):
    """Its layers are still mounted; `engine stop --force` of the same engine clears that."""
    with ours(home, one) as driver:
        driver.create("parent")
        driver.get("parent")
        driver.put("parent")
    words = [sys.executable, "-m", "tests.support.layer_churn", str(home), "parent", one]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{layer_churn.READY}\n"
        kept = [process.stdout.readline().strip() for _ in range(3)]
        process.send_signal(signal.SIGKILL)
    with pytest.raises(PoolBusy):
        devmapper.init(home, OPTIONS, engine=other)
    Command(home, OPTIONS, engine=one)("engine", "stop", "--force")
    with ours(home, other) as driver:
        assert set(kept) <= set(driver.layers())
        for layer in kept:
            assert (Path(driver.get(layer)) / "content").read_bytes() == layer_churn.CONTENT
            driver.put(layer)
