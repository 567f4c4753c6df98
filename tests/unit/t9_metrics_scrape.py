"""What Prometheus gets: from a sound pool, a full one, a failed one, one that hangs, and none."""

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from devmapper.engine.port import PoolMode
from devmapper.errors import EngineError, PoolUnusable, UsageError
from devmapper.server.http import TcpAddress
from devmapper.server.metrics.collector import OTHERS
from devmapper.server.metrics.service import MetricsService
from devmapper.server.observer import Observer
from devmapper.server.operations import Operations
from devmapper.server.sampling import Sampler
from devmapper.snapshots.model import Info, Kind
from devmapper.units import Bytes, ThinId
from tests.support.observed import Observed, observed
from tests.support.pools import BLOCK, ONE, Background, fill, used, write

LOCAL = TcpAddress("127.0.0.1", 0)


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Observed]:
    with observed(tmp_path / "graph", "one", "two", web="docker", image="containerd") as graph:
        yield graph


@contextmanager
def serving(graph: Observed, **options: Any) -> Iterator[MetricsService]:
    service = MetricsService(graph.driver, None, Operations(), LOCAL, **options)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def get(service: MetricsService, path: str, **headers: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(service: MetricsService) -> Series:
    """All series of a scrape by name and labels."""
    status, content_type, text = get(service, "/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def value(found: Series, name: str, **labels: str) -> float:
    return found[f"devmapper_{name}", tuple(sorted(labels.items()))]


def modes(found: Series) -> list[str]:
    """The modes that the pool is in."""
    return [
        dict(labels)["mode"]
        for (name, labels), number in found.items()
        if name == "devmapper_pool_mode" and number == 1
    ]


def test_a_sound_pool(graph, pool, table):
    graph.follow(pool.status, table)
    pool.create_thin(ONE)
    write(pool.open_device(ONE, 64 * BLOCK), 0, b"x" * BLOCK * 10)
    pool.commit()
    with serving(graph) as service:
        found = scrape(service)
        assert value(found, "pool_up") == 1
        assert value(found, "pool_status_age_seconds") < 5
        assert modes(found) == ["rw"]
        assert value(found, "pool_needs_check") == 0
        assert value(found, "pool_data_used_bytes") == used(pool) * BLOCK == 10 * BLOCK
        assert value(found, "pool_data_size_bytes") == 256 * BLOCK
        assert value(found, "pool_data_available_bytes") <= 246 * BLOCK
        assert value(found, "pool_metadata_size_bytes") == 4 << 20
        assert 0 < value(found, "pool_metadata_used_bytes") < 4 << 20
        assert value(found, "pool_reserve_bytes") == 256 * BLOCK // 10
        assert value(found, "layers", owner="docker") == 1
        assert value(found, "layers", owner="containerd") == 1
        assert value(found, "layers", owner="-") == 3  # the base layer, one and two
        assert value(found, "layer_exclusive_bytes", layer="web", owner="docker", snapshot="") == 0
        assert value(found, "layer_mapped_bytes", layer="base", owner="-", snapshot="") == 0
        assert value(found, "layers_active") == 0
        (info,) = (dict(labels) for name, labels in found if name == "devmapper_info")
        assert info["engine"] == "local"
        assert info["home"] == str(graph.driver.home)
        assert get(service, "/healthz")[::2] == (
            200,
            f"pool {info['pool']} answers and is in mode rw\n",
        )


def test_layers_that_take_space(graph):
    thin_id = ThinId(graph.driver.devices.dev_info("web").device_id)
    metadata = graph.pool._metadata
    metadata.insert_many(thin_id, [(n, metadata.allocate_data_block()) for n in range(3)])
    graph.driver.devices.add_device("child", "web")
    metadata.insert(thin_id, 3, metadata.allocate_data_block())
    with serving(graph) as service:
        found = scrape(service)
    block_size = graph.pool.status().block_size
    assert (
        value(found, "layer_exclusive_bytes", layer="web", owner="docker", snapshot="")
        == block_size
    )
    assert (
        value(found, "layer_mapped_bytes", layer="web", owner="docker", snapshot="")
        == 4 * block_size
    )
    assert value(found, "layer_exclusive_bytes", layer="child", owner="-", snapshot="") == 0
    assert (
        value(found, "layer_mapped_bytes", layer="child", owner="-", snapshot="") == 3 * block_size
    )
    assert value(found, "pool_data_used_bytes") == 4 * block_size


def test_openmetrics_when_it_is_asked_for(graph):
    with serving(graph) as service:
        _, content_type, text = get(
            service, "/metrics", Accept="application/openmetrics-text; version=1.0.0"
        )
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]
    assert families["devmapper_pool_up"].samples[0].value == 1
    assert families["devmapper"].type == "info"


def test_more_layers_than_there_may_be_series(graph):
    for number in range(6):
        graph.driver.devices.add_device(f"more{number}", "", owner="docker")
    with serving(graph, max_layers=2) as service:
        found = scrape(service)
    series = [dict(labels) for name, labels in found if name == "devmapper_layer_exclusive_bytes"]
    named = [labels for labels in series if labels["layer"] != OTHERS]
    assert len(named) == 2
    rest = sorted(labels["owner"] for labels in series if labels["layer"] == OTHERS)
    assert rest == ["-", "docker"]
    assert value(found, "layers", owner="docker") == 7  # all of them are counted


def test_a_layer_whose_name_has_quotes(graph):
    graph.driver.create('a"b\\c')
    with serving(graph) as service:
        found = scrape(service)
    assert value(found, "layer_exclusive_bytes", layer='a"b\\c', owner="-", snapshot="") == 0


def test_layers_are_measured_once_in_an_interval(graph):
    with serving(graph, layers_interval=3600) as service:
        first = scrape(service)
        graph.driver.create("later")
        second = scrape(service)
        assert value(second, "layers", owner="-") == value(first, "layers", owner="-")
        assert value(second, "layers_scan_age_seconds") > value(first, "layers_scan_age_seconds")
    with serving(graph, layers_interval=0) as service:
        assert value(scrape(service), "layers", owner="-") == 4


def test_nothing_is_measured_while_nobody_scrapes(graph):
    with serving(graph, layers_interval=0):
        before = graph.pool.calls["status"]
        time.sleep(0.3)
        assert graph.pool.calls["status"] == before


def test_snapshots_are_counted_by_kind(graph):
    class Snapshots:
        def walk(self) -> Iterator[Info]:
            for name, kind in (("a", Kind.COMMITTED), ("b", Kind.COMMITTED), ("c", Kind.ACTIVE)):
                yield Info(name, kind, "", {}, 0, 0)

    service = MetricsService(graph.driver, Snapshots(), Operations(), LOCAL)
    service.start()
    try:
        found = scrape(service)
    finally:
        service.stop()
    assert value(found, "snapshots", kind="committed") == 2
    assert value(found, "snapshots", kind="active") == 1


def test_operations_are_a_part_of_it(graph):
    operations = Operations()
    service = MetricsService(graph.driver, None, operations, LOCAL)
    service.start()
    try:
        with operations.measure("docker", "Create"):
            found = scrape(service)
            labels = {"front_end": "docker", "operation": "Create"}
            assert value(found, "operations_under_way", **labels) == 1
            # A rate of 0 tells that nothing ends; no series would tell nothing
            assert value(found, "operation_duration_seconds_count", **labels) == 0
        with pytest.raises(UsageError), operations.measure("docker", "Create"):
            raise UsageError("no")
        found = scrape(service)
    finally:
        service.stop()
    assert value(found, "operation_duration_seconds_count", **labels) == 2
    assert value(found, "operation_errors_total", **labels, error="UsageError") == 1
    assert found["process_resident_memory_bytes", ()] > 0
    assert found["process_open_fds", ()] > 0


# Pools that are not well


def test_a_full_pool(graph, pool, table):
    graph.follow(pool.status, table)
    device, end = fill(pool, ONE)
    waiting = Background(lambda: write(device, end, b"x"))
    assert waiting.is_running()
    with serving(graph) as service:
        found = scrape(service)
        assert modes(found) == ["out_of_data_space"]
        assert value(found, "pool_data_used_bytes") == value(found, "pool_data_size_bytes")
        status, _, text = get(service, "/healthz")
        assert status == 503
        assert "is out of data space" in text
        larger = table._replace(data_size=Bytes(table.data_size + 64 * BLOCK))
        os.truncate(table.data_device, larger.data_size)
        pool.resize(larger)
        waiting.result()
        time.sleep(1.1)
        assert modes(scrape(service)) == ["rw"]
        assert get(service, "/healthz")[0] == 200


def test_a_pool_that_became_read_only(graph, rig):
    graph.follow(rig.pool.status)
    rig.pool.create_thin(ONE)
    rig.device.broken = True
    with pytest.raises(PoolUnusable):
        rig.pool.commit()
    rig.device.broken = False
    with serving(graph) as service:
        found = scrape(service)
        assert modes(found) == ["ro"]
        assert value(found, "pool_needs_check") == rig.pool.status().needs_check
        assert get(service, "/healthz")[0] == 503


def test_a_pool_that_failed(graph, rig):
    graph.follow(rig.pool.status)
    rig.pool.create_thin(ONE)
    rig.device.broken = rig.device.unreadable = True
    rig.device.spares_superblock = False
    with pytest.raises(PoolUnusable):
        rig.pool.commit()
    with serving(graph) as service:
        found = scrape(service)
        assert value(found, "pool_up") == 1
        assert modes(found) == ["fail"]
        assert get(service, "/healthz")[0] == 503
    rig.device.broken = rig.device.unreadable = False


def test_a_failed_pool_of_the_kernel_tells_no_sizes(graph, pool):
    failed = pool.status()._replace(
        mode=PoolMode.FAIL, used_data_blocks=0, total_data_blocks=0, used_metadata_blocks=0,
        total_metadata_blocks=0,
    )  # fmt: skip
    graph.follow(lambda: failed)
    with serving(graph) as service:
        found = scrape(service)
        assert modes(found) == ["fail"]
        assert value(found, "pool_up") == 1
        assert ("devmapper_pool_data_used_bytes", ()) not in found
        assert get(service, "/healthz")[::2] == (
            503,
            f"pool {graph.pool.name} has failed: it does no I/O any more\n",
        )


def test_a_pool_that_cannot_be_asked(graph):
    with serving(graph) as service:
        scrape(service)
        graph.fails_with(EngineError("the engine has ended"))
        time.sleep(1.1)
        found = scrape(service)
        assert value(found, "pool_up") == 0
        assert value(found, "pool_data_size_bytes") == 4 << 20  # as it was known last
        assert value(found, "pool_status_age_seconds") > 1
        status, _, text = get(service, "/healthz")
        assert status == 503
        assert "the engine has ended" in text


def test_a_graph_that_is_closed(tmp_path):
    with observed(tmp_path / "graph") as graph, serving(graph) as service:
        graph.driver.close()
        found = scrape(service)
        assert value(found, "pool_up") == 0
        assert ("devmapper_pool_mode", (("mode", "rw"),)) not in found
        assert get(service, "/healthz")[0] == 503


def test_a_pool_that_hangs_keeps_no_scrape(graph):
    answers = graph.pool.status
    go_on = threading.Event()

    def hanging():
        go_on.wait(600)  # more than a test may take
        return answers()

    with serving(graph) as service:
        scrape(service)
        graph.follow(hanging)
        time.sleep(1.1)
        found = scrape(service)
        assert value(found, "pool_up") == 0
        assert value(found, "pool_data_size_bytes") == 4 << 20
        with ThreadPoolExecutor(50) as many:  # only the first ones have waited
            all_found = list(many.map(lambda _: scrape(service), range(100)))
        assert {value(found, "pool_up") for found in all_found} == {0}
        threads = [each for each in threading.enumerate() if each.name == "sample pool"]
        assert len(threads) == 1
        go_on.set()
        threads[0].join(60)
        assert value(scrape(service), "pool_up") == 1


# Who asks for what


def test_other_requests(graph):
    with serving(graph) as service:
        assert get(service, "/")[0] == 200
        assert get(service, "/nothing")[0] == 404
        assert get(service, "/metrics/../../etc/passwd")[0] == 404
        assert get(service, "/metrics", Accept="\xff;;;q=;,")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        connection.request("POST", "/metrics", body=b"x" * 100)
        answer = connection.getresponse()
        assert answer.status == 405
        answer.read()
        connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\0" * 5000,
    ],
)
def test_what_is_no_request(graph, sent):
    with serving(graph) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
            client.sendall(sent)
            answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.") or answer == b""
        assert b" 200 " not in answer.partition(b"\r\n")[0] or b"chunked" in sent
        assert value(scrape(service), "pool_up") == 1  # it goes on


def test_a_client_that_goes_away(graph):
    with serving(graph) as service:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert value(scrape(service), "pool_up") == 1


def test_a_unix_socket(graph, tmp_path):
    path = tmp_path / "metrics.sock"
    service = MetricsService(graph.driver, None, Operations(), path)
    service.start()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
    finally:
        service.stop()
    assert b"answers and is in mode rw" in answer
    assert not path.exists()


def test_options_that_are_not_fit(graph):
    for options in ({"max_layers": -1}, {"layers_interval": -0.5}):
        with pytest.raises(UsageError):
            MetricsService(graph.driver, None, Operations(), LOCAL, **options)


# Sampling


def test_many_ask_and_one_measures():
    calls: list[None] = []
    go_on = threading.Event()

    def measure() -> int:
        calls.append(None)
        go_on.wait(60)
        return len(calls)

    sampler = Sampler("test", measure)
    assert sampler.sample(max_age=0, patience=0.05).value is None
    assert "has not answered" in sampler.sample(max_age=0, patience=0.05).error
    with ThreadPoolExecutor(8) as many:
        asked = [many.submit(sampler.sample, max_age=0, patience=10) for _ in range(8)]
        go_on.set()
        assert {each.result().value for each in asked} <= {1, 2}
    sampler.stop(10)
    assert sampler.sample(max_age=60, patience=1).value is not None


def test_a_defect_of_a_measurement_is_logged_and_told(caplog):
    sampler: Sampler[int] = Sampler("test", lambda: 1 // 0)
    found = sampler.sample(max_age=0, patience=10)
    assert found.value is None
    assert "unexpected error" in found.error
    assert "ZeroDivisionError" in caplog.text


def test_a_shared_observer_is_not_stopped(graph):
    observer = Observer(graph.driver)
    service = MetricsService(graph.driver, None, Operations(), LOCAL, observer=observer)
    service.start()
    service.stop()
    assert observer.pool().value is not None
    observer.stop()
