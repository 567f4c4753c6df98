"""The watch: one line for each change of a pool that is really filled and really fails."""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.engine.port import PoolMode
from devmapper.errors import EngineError, PoolUnusable, UsageError
from devmapper.server.conditions import Condition, Thresholds
from devmapper.server.observer import Observer, PoolReading
from devmapper.server.operations import Operations
from devmapper.server.sampling import Sample
from devmapper.server.watch import PoolWatch
from devmapper.units import Bytes
from tests.support.observed import Observed, observed
from tests.support.pools import BLOCK, ONE, Background, write
from tests.support.waiting import wait_for

HALF = Thresholds(data=50, metadata=10)


class Always(Observer):
    """Asks each time, however soon it is asked again."""

    def pool(self, *, max_age: float = 0, patience: float = 2.0) -> Sample[PoolReading]:
        return super().pool(max_age=0, patience=patience)


class Watched:
    """A watch that looks when it is told to, its lines, and its counts."""

    def __init__(self, graph: Observed, caplog: pytest.LogCaptureFixture) -> None:
        self.graph = graph
        self._caplog = caplog
        self._operations = Operations()
        self._observer = Always(graph.driver)
        self.watch = PoolWatch(self._observer, self._operations, thresholds=HALF)

    def look(self) -> list[tuple[str, str]]:
        """The lines that one look has logged, without the pool's name."""
        self._caplog.clear()
        self.watch.look()
        name = self.graph.pool.name
        return [
            (record.levelname, record.getMessage().replace(name, "P"))
            for record in self._caplog.records
            if record.name == "devmapper.server.watch"
        ]

    def count(self, event: str) -> float | None:
        return self._operations.registry.get_sample_value(
            "devmapper_pool_events_total", {"event": event}
        )


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Observed]:
    with observed(tmp_path / "graph") as graph:
        yield graph


@pytest.fixture
def watched(graph: Observed, caplog: pytest.LogCaptureFixture) -> Watched:
    caplog.set_level(logging.INFO, "devmapper")
    return Watched(graph, caplog)


def words(lines: list[tuple[str, str]]) -> list[str]:
    return [line.partition(";")[0].partition(":")[0] for _, line in lines]


def test_a_pool_that_is_filled_and_grows(watched, pool, table):
    watched.graph.follow(pool.status, table)
    pool.create_thin(ONE)
    device = pool.open_device(ONE, Bytes(600 * BLOCK))
    assert watched.look() == []
    assert watched.count("low_data") == 0  # there from the start, for rates

    write(device, 0, b"x" * BLOCK * 128)
    ((level, line),) = watched.look()
    assert level == "WARNING"
    assert line.startswith("pool P is low on data: 8.389 MB of 16.78 MB are free; remove layers")
    assert watched.look() == []  # once

    write(device, 128 * BLOCK, b"x" * BLOCK * 128)
    waiting = Background(lambda: write(device, 256 * BLOCK, b"x"))
    assert waiting.is_running()
    ((level, line),) = watched.look()
    assert level == "ERROR"
    assert line.startswith("pool P is out of data space; writes to new blocks wait")
    assert watched.look() == []
    assert watched.watch.present == {Condition.LOW_DATA, Condition.OUT_OF_DATA_SPACE}

    larger = table._replace(data_size=Bytes(table.data_size + 400 * BLOCK))
    os.truncate(table.data_device, larger.data_size)
    pool.resize(larger)
    waiting.result()
    assert watched.look() == [
        ("INFO", "pool P has data space again"),
        ("INFO", "pool P has enough free data again"),
        ("INFO", "pool P is well"),
    ]
    assert watched.look() == []
    counts = {event: watched.count(event) for event in ("low_data", "out_of_data_space")}
    assert counts == {"low_data": 1, "out_of_data_space": 1}
    assert watched.count("recovered") == 1
    assert watched.count("read_only") == 0


def test_a_pool_on_the_border_is_told_of_once(watched, pool, table):
    watched.graph.follow(pool.status, table)
    pool.create_thin(ONE)
    device = pool.open_device(ONE, Bytes(256 * BLOCK))
    write(device, 0, b"x" * BLOCK * 129)
    assert words(watched.look()) == ["pool P is low on data"]
    for _ in range(3):
        device.discard(0, 4 * BLOCK)
        pool.commit()
        assert watched.look() == []
        write(device, 0, b"x" * BLOCK * 4)
        assert watched.look() == []
    device.discard(0, 60 * BLOCK)
    pool.commit()
    assert words(watched.look()) == ["pool P has enough free data again", "pool P is well"]


def test_the_pools_own_low_water_mark(watched, pool, table):
    """Its mark counts too, unless the whole pool is smaller."""
    watched.watch = PoolWatch(Always(watched.graph.driver), Operations(), thresholds=Thresholds(1))
    pool.create_thin(ONE)
    write(pool.open_device(ONE, Bytes(256 * BLOCK)), 0, b"x" * BLOCK * 100)
    status = pool.status

    def below(mark: int) -> None:
        watched.graph.follow(
            lambda: status()._replace(low_water_reached=mark >= 156),
            table._replace(low_water_mark=mark),
        )

    below(32768)
    assert watched.look() == []
    below(100)
    assert watched.look() == []
    below(156)
    assert words(watched.look()) == ["pool P is low on data"]


def test_a_pool_that_loses_its_metadata_device(watched, rig):
    watched.graph.follow(rig.pool.status)
    rig.pool.create_thin(ONE)
    assert watched.look() == []
    rig.device.broken = True
    with pytest.raises(PoolUnusable):
        rig.pool.commit()
    assert rig.pool.status().mode is PoolMode.READ_ONLY
    found = watched.look()
    assert ("ERROR", "pool P is read-only") in [(a, b.partition(";")[0]) for a, b in found]
    assert watched.look() == []
    rig.device.broken = False


def test_from_bad_to_worse_is_no_recovery(watched, pool, table):
    status = pool.status()
    lines = []
    for mode in (PoolMode.OUT_OF_DATA_SPACE, PoolMode.READ_ONLY, PoolMode.FAIL, PoolMode.WRITE):
        watched.graph.follow(lambda mode=mode: status._replace(mode=mode))
        lines.append(words(watched.look()))
    assert lines == [
        ["pool P is out of data space"],
        ["pool P is read-only"],
        ["pool P has failed"],
        ["pool P has not failed any more", "pool P is well"],
    ]


def test_a_check_that_is_needed(watched, pool):
    status = pool.status()
    watched.graph.follow(lambda: status._replace(needs_check=True, mode=PoolMode.READ_ONLY))
    found = watched.look()
    assert words(found) == ["pool P is read-only", "the metadata of pool P need a check"]
    assert "devmapper pool check --clear-needs-check" in found[1][1]


def test_metadata_that_run_short(watched, pool):
    status = pool.status()
    watched.graph.follow(lambda: status._replace(used_metadata_blocks=980))
    ((level, line),) = watched.look()
    assert level == "WARNING"
    assert "low on metadata" in line
    assert "--metadata SIZE" in line


def test_a_pool_that_does_not_answer_keeps_what_was_known(watched, pool):
    status = pool.status()
    watched.graph.follow(lambda: status._replace(used_data_blocks=250))
    assert words(watched.look()) == ["pool P is low on data"]
    watched.graph.fails_with(EngineError("gone"))
    ((level, line),) = watched.look()
    assert (level, line.partition(";")[0]) == ("ERROR", "pool P does not tell its state: gone")
    assert watched.look() == []
    watched.graph.follow(lambda: status._replace(used_data_blocks=250))
    assert words(watched.look()) == ["pool P tells its state again"]
    watched.graph.follow(lambda: status)
    assert words(watched.look()) == ["pool P has enough free data again", "pool P is well"]


def test_it_looks_by_itself_and_ends(graph, pool, caplog):
    status = pool.status()
    operations = Operations()
    watch = PoolWatch(Always(graph.driver), operations, interval=0.05)
    watch.start()
    try:
        graph.follow(lambda: status._replace(used_data_blocks=256))
        wait_for(lambda: watch.present)
    finally:
        watch.stop()
    watch.stop()
    assert "low on data" in caplog.text
    assert not [each for each in threading.enumerate() if each.name == "pool watch"]


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 0.0},
        {"interval": float("nan")},
        {"thresholds": Thresholds(data=101)},
        {"thresholds": Thresholds(metadata=-1)},
    ],
)
def test_options_that_are_not_fit(graph, options):
    with pytest.raises(UsageError):
        PoolWatch(Observer(graph.driver), Operations(), **options)
