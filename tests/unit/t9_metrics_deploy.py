"""Dashboard, alerts and the page on monitoring speak of metrics that a real scrape has."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from devmapper.errors import UsageError
from devmapper.server.http import TcpAddress
from devmapper.server.metrics.service import MetricsService
from devmapper.server.observer import Observer
from devmapper.server.operations import Operations
from devmapper.server.watch import PoolWatch
from devmapper.snapshots.model import Info, Kind
from tests.support.observed import observed

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "devmapper.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
PAGE = ROOT / "docs" / "monitoring.md"

_METRIC = re.compile(r"\b(?:devmapper|process)_[a-z_]+\b")
_LABELS = re.compile(r"\bby \(([^)]*)\)|\{([^}]*)\}")
_OF_PROMETHEUS = {"job", "instance"}  # labels that the server adds


class Snapshots:
    def walk(self) -> Iterator[Info]:
        yield Info("a", Kind.COMMITTED, "", {}, 0, 0)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The names of all series of a daemon at work, and their labels."""
    operations = Operations()
    home = tmp_path_factory.mktemp("deploy") / "graph"
    with observed(home, "one", web="docker") as graph:
        observer = Observer(graph.driver, Snapshots())
        PoolWatch(observer, operations).look()
        with pytest.raises(UsageError), operations.measure("docker", "Create"):
            raise UsageError("no")
        service = MetricsService(
            graph.driver, None, operations, TcpAddress("127.0.0.1", 0), observer=observer
        )
        text = generate_latest(service._registry).decode()
    found: dict[str, set[str]] = {}
    for family in parse(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def dashboard_queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alert_queries() -> list[str]:
    """The expressions of the rules; a block goes on while its lines are indented more."""
    found = []
    lines = iter(ALERTS.read_text().splitlines())
    for line in lines:
        match = re.fullmatch(r"( +)expr: (.*)", line)
        if match is None:
            continue
        text = match[2]
        if text == ">-":
            text = ""
            for more in lines:
                if not more.startswith(f"{match[1]}  "):
                    break
                text += f" {more.strip()}"
        found.append(text)
    return found


def check(query: str, series: dict[str, set[str]]) -> None:
    metrics = _METRIC.findall(query)
    assert metrics, query
    known = set(_OF_PROMETHEUS)
    for metric in metrics:
        assert metric in series, query
        known |= series[metric]
    for grouped, selected in _LABELS.findall(query):
        names = (
            grouped.split(",") if grouped else re.findall(r'(\w+)\s*(?:=~|!=|!~|=)\s*"', selected)
        )
        assert {name.strip() for name in names} <= known, query


def test_the_dashboards_queries(series):
    queries = dashboard_queries()
    assert len(queries) > 20
    for query in queries:
        check(query, series)


def test_the_dashboards_legends(series):
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            known = set().union(*(series[name] for name in _METRIC.findall(target["expr"])))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known


def test_the_dashboard_is_the_one_that_is_written_by_the_tool():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import dashboard  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    assert DASHBOARD.read_text() == dashboard.text(), "run .venv/bin/python tools/dashboard.py"


def test_the_panels_do_not_overlap():
    taken = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))


def test_the_alerts_queries(series):
    queries = alert_queries()
    assert len(queries) == ALERTS.read_text().count("- alert:") == 10
    for query in queries:
        check(query, series)


def test_a_query_of_something_that_is_not_there_is_found(series):
    for query in ("devmapper_nothing == 1", 'devmapper_pool_mode{colour="red"}'):
        with pytest.raises(AssertionError):
            check(query, series)


def test_every_metric_is_documented(series):
    """And the page speaks of no other."""
    listed = {name for name in series if name.startswith("devmapper_")}
    listed = {_family(name) for name in listed if not name.endswith("_created")}
    page = PAGE.read_text()
    documented = {_family(name) for name in re.findall(r"`(devmapper_\w+)[`{ ]", page)}
    assert documented == listed


def _family(name: str) -> str:
    return re.sub(r"_(bucket|count|sum)$", "", name)
