"""`GET /metrics` for Prometheus and `GET /healthz` for whoever wants yes or no.

A pool that is full, read-only or failed is scraped like any other, and one that does not answer
keeps no scrape: what is known is told, with its age.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from devmapper.driver import Driver
from devmapper.errors import UsageError
from devmapper.server.address import Address
from devmapper.server.conditions import WARNINGS, Thresholds, remarks
from devmapper.server.http import HttpService
from devmapper.server.metrics.collector import (
    LAYERS_INTERVAL_SECONDS,
    MAX_LAYERS,
    GraphCollector,
)
from devmapper.server.observer import Observer, SnapshotList
from devmapper.server.operations import Operations
from devmapper.server.overview import own_version
from devmapper.server.service import STOP_SECONDS

_PLAIN: Final = "text/plain"
_LARGEST_REQUEST: Final = 4096


class MetricsService:
    """Implements `Service`."""

    def __init__(
        self,
        driver: Driver,
        snapshots: SnapshotList | None,
        operations: Operations,
        address: Address,
        *,
        observer: Observer | None = None,
        max_layers: int = MAX_LAYERS,
        layers_interval: float = LAYERS_INTERVAL_SECONDS,
    ) -> None:
        """With *observer* what others have measured is shared; it is not stopped here then.

        *layers_interval* is how many seconds the layers' sizes may be old.  `UsageError`.
        """
        if max_layers < 0:
            raise UsageError(f"max-layers {max_layers} is less than 0")
        if layers_interval < 0:
            raise UsageError(f"layers-interval {layers_interval} is less than 0 seconds")
        self._observer = observer or Observer(driver, snapshots)
        self._own_observer = observer is None
        graph = GraphCollector(
            self._observer, own_version(), max_layers=max_layers, layers_interval=layers_interval
        )
        process = CollectorRegistry()
        ProcessCollector(registry=process)
        self._registry = _Together((graph, operations.registry, process))
        self._http = HttpService("metrics", address, self._application)

    @property
    def name(self) -> str:
        return self._http.name

    @property
    def address(self) -> Address:
        """See `Service.address`."""
        return self._http.address

    @property
    def port(self) -> int:
        """The port of a TCP address while it listens."""
        return self._http.port

    def start(self) -> None:
        """See `Service.start`."""
        self._http.start()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """See `Service.stop`."""
        self._http.stop(seconds)
        if self._own_observer:
            self._observer.stop()

    def _application(self) -> web.Application:
        made = web.Application(client_max_size=_LARGEST_REQUEST)
        made.router.add_get("/", self._index)
        made.router.add_get("/metrics", self._metrics)
        made.router.add_get("/healthz", self._health)
        return made

    async def _index(self, _request: web.Request) -> web.Response:
        return web.Response(text="devmapper: /metrics and /healthz\n", content_type=_PLAIN)

    async def _metrics(self, request: web.Request) -> web.Response:
        encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
        body = await self._http.in_thread(encoder, self._registry)
        # Not `content_type=`: the format's version is a parameter of it
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _health(self, _request: web.Request) -> web.Response:
        sentence, well = await self._http.in_thread(self._judge)
        status = 200 if well else 503
        return web.Response(text=f"{sentence}\n", status=status, content_type=_PLAIN)

    def _judge(self) -> tuple[str, bool]:
        """One sentence, and whether the pool takes writes."""
        sample = self._observer.pool()
        found = remarks(sample, Thresholds(0, 0))
        serious = [remark for remark in found if remark.condition not in WARNINGS]
        if serious or sample.value is None:
            return "; ".join(remark.sentence for remark in serious), False
        status = sample.value.status
        return f"pool {status.pool_name} answers and is in mode {status.mode}", True


class _Together(CollectorRegistry):
    """Several collectors, each asked once for each scrape."""

    def __init__(self, collectors: Iterable[Collector]) -> None:
        super().__init__()
        self._all = tuple(collectors)

    def collect(self) -> Iterator[Metric]:
        for collector in self._all:
            yield from collector.collect()
