"""Prometheus itself reads what the daemon tells, and judges it by our rules; so does promtool."""

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from math import isnan
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from devmapper.thin.blocks import FileDevice
from devmapper.thin.metadata import PoolMetadata
from devmapper.units import MIB
from tests.e2e.test_serve_metrics import get
from tests.support import snapshots_client
from tests.support.daemon import Daemon, served
from tests.support.prometheus import ALERTS, JOB, Prometheus, prometheus, promtool
from tests.support.waiting import wait_for

RULE_TESTS = ALERTS.with_name("alerts_test.yml")
DASHBOARD = ALERTS.parents[1] / "grafana" / "devmapper.json"
KEY = "test/1/web"

pytestmark = pytest.mark.prometheus


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_promtool_reads_the_rules():
    assert f"SUCCESS: {len(rules())} rules found" in promtool("check", "rules", ALERTS)


def test_every_alert_fires_and_is_silent_when_it_should():
    promtool("test", "rules", RULE_TESTS)
    fires: set[str] = set()
    silent: set[str] = set()
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for each in test["alert_rule_test"]:
            (fires if each["exp_alerts"] else silent).add(each["alertname"])
    assert fires == silent == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize("change", [("> 0.9", "> 0.97"), ("for: 2m", "for: 9m")])
def test_a_rule_that_was_changed_is_found(tmp_path, change):
    """The tests of the rules can fail."""
    changed = ALERTS.read_text().replace(*change)
    assert changed != ALERTS.read_text()
    (tmp_path / ALERTS.name).write_text(changed)
    (tmp_path / RULE_TESTS.name).write_text(RULE_TESTS.read_text())
    with pytest.raises(AssertionError, match="FAILED"):
        promtool("test", "rules", tmp_path / RULE_TESTS.name)


def listens_at(daemon: Daemon) -> str:
    """The address of a daemon that chose its port."""
    return str(re.findall(r"metrics on (127\.0\.0\.1:\d+)", daemon.log.read_text())[-1])


def ask(daemon: Daemon) -> None:
    """Requests of containerd, one of which fails."""
    with snapshots_client.connected(daemon.containerd) as client:
        client.mounts(KEY)
        with pytest.raises(grpc.RpcError, match="does not exist"):
            client.stat("test/2/nothing")


def panels() -> dict[str, str]:
    """The dashboard's expressions by panel and legend, with Grafana's variables filled in."""
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        .replace("$instance", ".*")
        .replace("$job", ".*")
        .replace("$__rate_interval", "30s")
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
    }


def variables(server: Prometheus) -> dict[str, list[str]]:
    """What the dashboard offers to choose from; Grafana asks the server for a label's values."""
    found = {}
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match
            selector = match[1].replace("$job", ".*")
            found[variable["name"]] = server.get(
                f"label/{match[2]}/values", **{"match[]": selector}
            )
    return found


@contextmanager
def listening(folder: Path) -> Iterator[tuple[Daemon, str]]:
    """A daemon with one snapshot, and its address for Prometheus: the port is one that was free."""
    folder.mkdir()
    with served(
        folder,
        check_log=False,
        containerd=True,
        metrics_address="127.0.0.1:0",
        watch_interval="200ms",
    ) as daemon:
        with snapshots_client.connected(daemon.containerd) as client:
            client.prepare(KEY)
        yield daemon, listens_at(daemon)


@contextmanager
def asking_for_a_check(folder: Path) -> Iterator[str]:
    """The address of a daemon whose pool has the flag needs_check, which makes it read-only."""
    with listening(folder) as (daemon, _):
        daemon.stop()
        daemon.command.stop()
        with closing(FileDevice.open(daemon.home / "devicemapper" / "metadata")) as device:
            PoolMetadata.open(device).set_needs_check(needs_check=True)
        daemon.start()
        yield listens_at(daemon)


def assert_dashboard_shows(server: Prometheus, daemon: Daemon) -> None:
    """Each panel has data of a daemon at work, with the labels of which its legends speak."""
    empty = panels()
    assert len(empty) > 20

    def all_have_data() -> bool:
        ask(daemon)
        for name, expression in list(empty.items()):
            found = [series for series in server.query(expression) if not isnan(series.value)]
            labels = set().union(*(series.labels for series in found))
            if found and labels >= set(re.findall(r"\{\{(\w+)\}\}", name)):
                del empty[name]
        return not empty

    wait_for(all_have_data, lambda: f"nothing to show: {empty}")


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.e2e
def test_daemons_that_prometheus_scrapes(tmp_path):
    with (
        listening(tmp_path / "a") as (daemon, a),
        asking_for_a_check(tmp_path / "b") as b,
        prometheus(tmp_path / "prometheus", [a, b]) as server,
    ):
        wait_for(
            lambda: len(server.query('devmapper_snapshots{kind="active"} == 1')) == 2,
            lambda: str(server.get("targets")),
        )
        of_a = f'{{job="{JOB}", instance="{a}"}}'
        (info,) = server.query(f"devmapper_info{of_a}")
        assert (info.labels["engine"], info.labels["home"]) == ("embedded", str(daemon.home))
        assert server.value(f"devmapper_pool_data_size_bytes{of_a}") == 1024 * MIB
        assert variables(server) == {"job": [JOB], "instance": sorted([a, b])}
        assert_dashboard_shows(server, daemon)

        expected = {
            (b, "DevmapperPoolNeedsCheck", "firing"),
            (b, "DevmapperPoolTakesNoWrites", "pending"),
        }
        wait_for(lambda: server.alerts() == expected, lambda: str(server.alerts()))
        daemon.kill()
        expected.add((a, "DevmapperDaemonDown", "pending"))
        wait_for(lambda: server.alerts() == expected, lambda: str(server.alerts()))


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.e2e
def test_promtool_finds_nothing_odd_in_a_scrape(tmp_path):
    with served(tmp_path, containerd=True, docker=True, metrics=True) as daemon:
        with snapshots_client.connected(daemon.containerd) as client:
            client.prepare(KEY)
        ask(daemon)
        status, text = get(daemon.metrics, "/metrics")
    assert " 200 " in status
    for name in ("devmapper_operation_errors_total", "devmapper_snapshots", "devmapper_layers"):
        assert f"{name}{{" in text
    assert promtool("check", "metrics", stdin=text.encode()) == ""
