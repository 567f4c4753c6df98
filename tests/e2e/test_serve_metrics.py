"""The daemon as Prometheus, a probe and its log see it."""

import socket
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from devmapper.units import MIB
from tests.support.daemon import served

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]


def get(path: Path, url: str) -> tuple[str, str]:
    """The status line and the body of an answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(f"GET {url} HTTP/1.0\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return head.splitlines()[0], body


def scrape(path: Path) -> dict[tuple[str, str], float]:
    """Series by name and by the event, mode or owner that they are of."""
    status, text = get(path, "/metrics")
    assert " 200 " in status
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def test_scrapes_of_a_daemon(tmp_path):
    with served(tmp_path, metrics=True, watch_interval="200ms") as daemon:
        assert daemon.metrics.stat().st_mode & 0o777 == 0o600
        found = scrape(daemon.metrics)
        assert found["devmapper_pool_up", ""] == 1
        assert found["devmapper_pool_mode", "rw"] == 1
        assert found["devmapper_pool_data_size_bytes", ""] == 1024 * MIB
        assert found["devmapper_layers", "-"] == 1
        assert found["devmapper_pool_events_total", "low_data"] == 0
        status, sentence = get(daemon.metrics, "/healthz")
        assert " 200 " in status
        assert sentence.endswith("answers and is in mode rw\n")
        for _ in range(20):
            scrape(daemon.metrics)
        assert daemon.rss() < 80 * MIB
        assert "pool" not in daemon.log.read_text().partition("serving graph")[2]


def test_the_daemon_warns_once(tmp_path):
    with served(
        tmp_path, metrics=True, check_log=False, watch_interval="100ms", watch_data_low_water=100
    ) as daemon:
        time.sleep(1)
        assert scrape(daemon.metrics)["devmapper_pool_events_total", "low_data"] == 1
        assert daemon.log.read_text().count("is low on data") == 1
        assert "devmapper pool resize" in daemon.log.read_text()


def test_a_daemon_that_does_not_watch(tmp_path):
    with served(tmp_path, metrics=True, watch=False, watch_data_low_water=100) as daemon:
        time.sleep(0.5)
        assert ("devmapper_pool_events_total", "low_data") not in scrape(daemon.metrics)
        assert "low on data" not in daemon.log.read_text()
