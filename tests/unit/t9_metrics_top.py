"""`devmapper top`: frames of several widths, rates and quantiles, and the way to and from JSON."""

import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from devmapper.cli.frame import activity, frame, quantile
from devmapper.engine.port import PoolMode
from devmapper.errors import EngineError
from devmapper.server.observer import LayerReading, Observer
from devmapper.server.operations import Operations
from devmapper.server.overview import Bucket, Overview, from_json, look, to_json
from tests.support.observed import Observed, observed


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Observed]:
    with observed(tmp_path / "graph", "one", web="docker") as graph:
        yield graph


@pytest.fixture
def operations() -> Operations:
    operations = Operations()
    for _ in range(3):
        with operations.measure("docker", "Create"):
            pass
    return operations


@pytest.fixture
def overview(graph: Observed, operations: Operations) -> Overview:
    return look(Observer(graph.driver), operations)


def drawn(
    overview: Overview, before: Overview | None = None, *, width: int, height: int | None = None
) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height or 100).print(
        frame(overview, before, width=width, height=height)
    )
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [1, 10, 20, 40, 59, 60, 79, 80, 120, 250])
@pytest.mark.parametrize("height", [1, 5, 24, None])
def test_no_line_is_wider_than_the_window(overview, width, height):
    lines = drawn(overview, overview, width=width, height=height)
    assert lines
    assert max(map(len, lines)) <= width


def test_what_a_frame_shows(graph, overview):
    lines = drawn(overview, width=120)
    assert lines[0].startswith("devmapper ")
    assert str(graph.driver.home) in lines[0]
    assert "mode rw" in lines[1]
    assert lines[2].startswith("data      [")
    assert lines[3].startswith("metadata  [|")
    assert lines[2].index("]") == lines[3].index("]")
    table = [line.split() for line in lines[5:]]
    assert table[0] == ["LAYER", "OWNER", "EXCLUSIVE", "MAPPED", "SIZE", "STATE"]
    assert ["web", "docker", "0", "B", "0", "B", "8.389", "MB", "-"] in table
    assert ["OPERATION", "RATE/S", "P50", "P99", "ERRORS", "NOW"] in table
    assert lines[-1].split()[:3] == ["docker", "Create", "-"]


def test_layers_that_do_not_fit_are_counted(overview):
    many = tuple(
        LayerReading(f"layer{n}", "-", "", 10, n, n, active=n == 1, mounted=False)
        for n in range(100)
    )
    lines = drawn(overview._replace(layers=many), width=80, height=24)
    assert len(lines) <= 24
    (more,) = [line for line in lines if line.startswith("and ")]
    shown = sum(line.startswith("layer") for line in lines)
    assert more.split()[1] == str(100 - shown)
    assert len(drawn(overview._replace(layers=many), width=80)) > 100


def test_a_snapshot_is_called_by_its_name(overview):
    one = LayerReading("snapshot-1f", "containerd", "app", 8, 0, 0, active=True, mounted=False)
    lines = drawn(overview._replace(layers=(one,)), width=80)
    assert any(line.split()[:2] == ["app", "containerd"] for line in lines)


def test_warnings_and_a_pool_that_does_not_answer(graph):
    observer = Observer(graph.driver)
    status = graph.pool.status()
    graph.follow(
        lambda: status._replace(
            mode=PoolMode.OUT_OF_DATA_SPACE, used_data_blocks=status.total_data_blocks
        )
    )
    lines = drawn(look(observer), width=100)
    assert "mode out_of_data_space" in lines[1]
    assert "100.0%" in lines[2]
    assert next(line for line in lines if line.startswith("! pool ")).endswith("out of data space")
    assert any("devmapper pool resize" in line for line in lines)
    graph.fails_with(EngineError("gone"))
    time.sleep(1.1)
    lines = drawn(look(observer), width=100)
    assert lines[1].endswith("1 s ago")
    assert any("does not tell its state: gone" in line for line in lines)


def test_a_pool_that_has_never_answered(graph):
    graph.fails_with(EngineError("gone"))
    found = look(Observer(graph.driver))
    assert found.pool is None
    assert found.layers == ()
    lines = drawn(found, width=100)
    assert any("the pool does not tell its state: gone" in line for line in lines)
    assert any(line.startswith("! layers: ") for line in lines)
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def test_to_json_and_back(overview):
    text = json.dumps(to_json(overview), allow_nan=False)
    assert from_json(json.loads(text)) == overview
    assert overview.operations[0].ended == 3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layers": None}, "expected"),
        ({"taken": "now"}, "expected float"),
        ({"pool": 7}, "PoolReading"),
        ({"remarks": [{"condition": "none", "sentence": "", "hint": ""}]}, "Condition"),
    ],
)
def test_what_is_no_overview(overview, change, word):
    packed = to_json(overview)
    assert isinstance(packed, dict)
    value = {**packed, **change}
    with pytest.raises(EngineError, match=word):
        from_json(value)
    del value["home"]
    with pytest.raises(EngineError, match="home"):
        from_json(value)


def test_rates_are_of_the_time_between(graph, operations, overview):
    with operations.measure("docker", "Create"):
        pass
    with pytest.raises(EngineError), operations.measure("containerd", "Prepare"):
        raise EngineError("no")
    with operations.measure("docker", "Get"):
        now = look(Observer(graph.driver), operations)
    now = now._replace(taken=overview.taken + 2)
    found = {each.operation: each for each in activity(now, overview)}
    assert found["Create"].rate == 0.5
    assert found["Prepare"].rate == 0.5
    assert found["Prepare"].errors == 1
    assert found["Get"].under_way == 1
    assert found["Get"].median is None
    # A daemon that was started anew counts from 0
    restarted = now._replace(operations=tuple(
        each._replace(ended=1) for each in now.operations if each.operation == "Create"
    ))  # fmt: skip
    assert activity(restarted, now._replace(taken=overview.taken))[0].rate == 0.5


def test_quantiles():
    buckets = [Bucket(0.1, 50), Bucket(0.2, 90), Bucket(1.0, 99)]
    assert quantile(0.5, buckets, 100) == pytest.approx(0.1)
    assert quantile(0.25, buckets, 100) == pytest.approx(0.05)
    assert quantile(0.7, buckets, 100) == pytest.approx(0.15)
    assert quantile(0.999, buckets, 100) == 1.0  # beyond the last limit
    assert quantile(0.5, buckets, 0) is None
    assert quantile(0.5, [], 5) is None
    assert not math.isnan(quantile(0.5, [Bucket(0.1, 0), Bucket(0.2, 0)], 1) or 0)
