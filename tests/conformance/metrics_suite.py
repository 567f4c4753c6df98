"""What Prometheus and the watch see of a real pool: used, filled to the last block, grown again."""

import http.client
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from devmapper.driver import Driver
from devmapper.server.http import TcpAddress
from devmapper.server.metrics.service import MetricsService
from devmapper.server.observer import Observer
from devmapper.server.operations import Operations
from devmapper.server.watch import PoolWatch
from devmapper.snapshots import Snapshots
from devmapper.units import MIB
from tests.conformance.graphdriver_base import GraphDriverBase
from tests.support.waiting import wait_for

_PATIENCE = 60.0
_PIECE = MIB


class MetricsSuite(GraphDriverBase):
    """Run it with an engine: `make_engine`."""

    @pytest.fixture
    def driver(self, home: Path) -> Iterator[Driver]:
        from tests.conformance.graphdriver_base import clean_up

        # A layer may hold more than the pool does
        driver = self.open(home, "dm.loopdatasize=48M", "dm.loopmetadatasize=8M")
        try:
            yield driver
        finally:
            clean_up(driver)

    @pytest.fixture
    def service(self, driver: Driver) -> Iterator[MetricsService]:
        observer = Observer(driver)
        service = MetricsService(
            driver, None, Operations(), TcpAddress("127.0.0.1", 0), observer=observer,
            layers_interval=0,
        )  # fmt: skip
        service.start()
        yield service
        service.stop()
        observer.stop()

    def test_a_pool_from_empty_to_full_and_back(self, driver, service, caplog):
        caplog.set_level(logging.INFO, "devmapper.server.watch")
        operations = Operations()
        watch = PoolWatch(Observer(driver), operations, interval=0.3)
        watch.start()
        try:
            self._fill_and_grow(driver, service, caplog)
        finally:
            watch.stop()

        def count(event: str) -> float | None:
            return operations.registry.get_sample_value(
                "devmapper_pool_events_total", {"event": event}
            )

        assert count("low_data") == 1
        assert count("out_of_data_space") == 1
        assert count("read_only") == count("failed") == count("silent") == 0

    def _fill_and_grow(
        self, driver: Driver, service: MetricsService, caplog: pytest.LogCaptureFixture
    ) -> None:
        driver.create("one")
        root = Path(driver.get("one"))
        found = scrape(service)
        assert found["devmapper_pool_up", ""] == 1
        assert found["devmapper_pool_mode", "rw"] == 1
        assert found["devmapper_pool_data_size_bytes", ""] == 48 * MIB
        assert found["devmapper_layers_active", ""] == 1
        assert found["devmapper_layers_mounted", ""] == 1
        before = found["devmapper_layer_exclusive_bytes", "one"]
        failures: list[OSError] = []
        writer = threading.Thread(target=_fill, args=(root / "big", 60, failures))
        writer.start()
        try:
            wait_for(lambda: scrape(service).get(("devmapper_pool_mode", "out_of_data_space")) == 1)
            found = scrape(service)
            assert found["devmapper_pool_up", ""] == 1
            size = found["devmapper_pool_data_size_bytes", ""]
            assert found["devmapper_pool_data_used_bytes", ""] == size
            assert found["devmapper_layer_exclusive_bytes", "one"] > before + 20 * MIB
            assert health(service)[0] == 503
            wait_for(lambda: "is out of data space" in caplog.text)
            assert "is low on data" in caplog.text
        finally:
            driver.devices.resize_pool(128 * MIB)
            writer.join(_PATIENCE)
            driver.put("one")
        assert not writer.is_alive()
        assert failures == []
        wait_for(lambda: scrape(service)["devmapper_pool_mode", "rw"] == 1)
        assert health(service)[0] == 200
        wait_for(lambda: "is well" in caplog.text)
        assert scrape(service)["devmapper_layers_mounted", ""] == 0

    def test_snapshots_of_containerd(self, driver):
        snapshots = Snapshots(driver.devices)
        service = MetricsService(driver, snapshots, Operations(), TcpAddress("127.0.0.1", 0))
        service.start()
        try:
            snapshots.prepare("first")
            snapshots.commit("image", "first")
            snapshots.prepare("second", "image")
            snapshots.view("third", "image")
            driver.create("other", owner="docker")
            status, text = _get(service, "/metrics")
        finally:
            service.stop()
            for name in ("third", "second", "image"):
                snapshots.remove(name)
            snapshots.close()
        assert status == 200
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in parse(text)
            for sample in family.samples
        }
        assert found["devmapper_snapshots", "committed"] == 1
        assert found["devmapper_snapshots", "active"] == 1
        assert found["devmapper_snapshots", "view"] == 1
        assert found["devmapper_layers", "containerd"] == 4  # with the root of all
        assert found["devmapper_layers", "docker"] == 1
        named = {key[3] for key in found if key[0] == "devmapper_layer_mapped_bytes"}
        assert named == {"", "image", "second", "third"}
        assert found["devmapper_layers", "-"] == 1

    def test_a_pool_that_was_let_go(self, driver, service):
        assert scrape(service)["devmapper_pool_up", ""] == 1
        driver.cleanup()
        time.sleep(1.1)
        found = scrape(service)
        assert found["devmapper_pool_up", ""] == 0
        assert found["devmapper_pool_data_size_bytes", ""] == 48 * MIB  # as it was last
        assert health(service)[0] == 503


def _fill(path: Path, pieces: int, failures: list[OSError]) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            for _ in range(pieces):
                os.write(fd, os.urandom(_PIECE))
                os.fsync(fd)  # so that a write that waits keeps nobody else's pages
        finally:
            os.close(fd)
    except OSError as err:
        failures.append(err)


def _get(service: MetricsService, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def scrape(service: MetricsService) -> dict[tuple[str, str], float]:
    """Series by name and by their label `mode` or `layer`, if they have one."""
    status, text = _get(service, "/metrics")
    assert status == 200
    return {
        (sample.name, sample.labels.get("mode", sample.labels.get("layer", ""))): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def health(service: MetricsService) -> tuple[int, str]:
    return _get(service, "/healthz")
