"""The metrics of a graph: which there are, what they mean, in which unit.

Names follow Prometheus' conventions: base units, `_total` for what only grows, and no series for
what is not known.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from devmapper.engine.port import PoolMode
from devmapper.server.observer import LayerReading, LayersReading, Observer, PoolReading

OTHERS: Final = "(others)"  # no layer can have this id
MAX_LAYERS: Final = 1000
_LAYER_LABELS: Final = ("layer", "owner", "snapshot")
LAYERS_INTERVAL_SECONDS: Final = 60.0


class GraphCollector(Collector):
    """Reads the graph when a scrape comes.

    At most *max_layers* layers have series of their own, those that take most; the rest are summed
    by their owners as layer `(others)`.
    """

    def __init__(
        self,
        observer: Observer,
        version: str,
        *,
        max_layers: int = MAX_LAYERS,
        layers_interval: float = LAYERS_INTERVAL_SECONDS,
    ) -> None:
        self._observer = observer
        self._version = version
        self._max_layers = max_layers
        self._layers_interval = layers_interval

    def collect(self) -> Iterator[Metric]:
        pool = self._observer.pool()
        up = pool.value is not None and not pool.error
        yield _gauge("pool_up", "Whether the pool tells its state", float(up))
        yield from _age(pool.age(), "pool_status", "the pool's state")
        if pool.value is not None:
            yield from self._about_pool(pool.value)
        layers = self._observer.layers(max_age=self._layers_interval)
        yield from _age(layers.age(), "layers_scan", "the layers' sizes")
        if layers.value is not None:
            yield _gauge(
                "layers_scan_duration_seconds", "How long measuring them took", layers.seconds
            )
            yield from self._about_layers(layers.value)

    def describe(self) -> list[Metric]:
        return []  # registering asks nothing of the pool

    def _about_pool(self, reading: PoolReading) -> Iterator[Metric]:
        status = reading.status
        info = {
            "version": self._version,
            "engine": status.engine,
            "library_version": status.library_version,
            "pool": status.pool_name,
            "home": self._observer.home,
        }
        yield InfoMetricFamily(
            "devmapper",
            "The graph that is served, and by what",
            {name: _text(value) for name, value in info.items()},
        )
        mode = GaugeMetricFamily(
            "devmapper_pool_mode", "1 for the mode that the pool is in", labels=("mode",)
        )
        for each in PoolMode:
            mode.add_metric((each.value,), float(each == status.mode))
        yield mode
        for name, text, value in (
            ("pool_needs_check", "Whether pool metadata have to be checked", status.needs_check),
            ("pool_transaction_id", "Number of the pool's last transaction", status.transaction_id),
            (
                "pool_low_water_reached",
                "Whether no more data is free than the pool's low-water mark",
                reading.low_water_reached,
            ),
            ("layers_active", "Thin devices that have a block device", reading.active),
            (
                "layers_deletion_put_off",
                "Layers that are deleted when their last user is gone",
                status.deferred_deleted_count,
            ),
        ):
            yield _gauge(name, text, float(value))
        if status.data.total:  # a pool that has failed tells no sizes
            yield from _about_space(reading)

    def _about_layers(self, reading: LayersReading) -> Iterator[Metric]:
        number = GaugeMetricFamily("devmapper_layers", "Layers by their owner", labels=("owner",))
        counts: dict[str, int] = {}
        for layer in reading.layers:
            counts[layer.owner] = counts.get(layer.owner, 0) + 1
        for owner, count in sorted(counts.items()):
            number.add_metric((_text(owner),), count)
        yield number
        mounted = sum(layer.mounted for layer in reading.layers)
        yield _gauge("layers_mounted", "Layers that are mounted where the daemon sees it", mounted)
        if reading.kinds:
            kinds = GaugeMetricFamily(
                "devmapper_snapshots", "Snapshots of containerd by their kind", labels=("kind",)
            )
            for kind, count in reading.kinds:
                kinds.add_metric((kind,), count)
            yield kinds
        exclusive = GaugeMetricFamily(
            "devmapper_layer_exclusive_bytes",
            "Data that only this layer uses: what removing it gives back",
            labels=_LAYER_LABELS,
        )
        mapped = GaugeMetricFamily(
            "devmapper_layer_mapped_bytes",
            "Data that this layer uses, alone or with others",
            labels=_LAYER_LABELS,
        )
        for layer in _capped(reading.layers, self._max_layers):
            labels = (_text(layer.id), _text(layer.owner), _text(layer.snapshot))
            exclusive.add_metric(labels, layer.exclusive)
            mapped.add_metric(labels, layer.mapped)
        yield exclusive
        yield mapped


def _about_space(reading: PoolReading) -> Iterator[Metric]:
    status = reading.status
    for word, usage in (("data", status.data), ("metadata", status.metadata)):
        yield _gauge(f"pool_{word}_used_bytes", f"Space for {word} in use", usage.used)
        yield _gauge(f"pool_{word}_size_bytes", f"Space for {word}, free or not", usage.total)
        yield _gauge(
            f"pool_{word}_available_bytes",
            f"Space for {word} that is free, in the pool and in the file system below a loop file",
            usage.available,
        )
    for name, text, value in (
        ("pool_block_size_bytes", "Size of a data block", status.sector_size),
        (
            "pool_reserve_bytes",
            "Free data below which no layer is made (dm.min_free_space)",
            status.min_free_space,
        ),
        (
            "pool_low_water_bytes",
            "Free data at which the pool itself warns, 0 if never",
            reading.low_water,
        ),
    ):
        yield _gauge(name, text, value)


def _capped(layers: Sequence[LayerReading], limit: int) -> list[LayerReading]:
    """The first *limit* layers, and one for each owner that stands for the rest of them."""
    rest: dict[str, LayerReading] = {}
    for layer in layers[limit:]:
        so_far = rest.get(layer.owner)
        rest[layer.owner] = layer._replace(
            id=OTHERS,
            snapshot="",
            mapped=layer.mapped + (so_far.mapped if so_far else 0),
            exclusive=layer.exclusive + (so_far.exclusive if so_far else 0),
        )
    return [*layers[:limit], *rest.values()]


def _age(age: float | None, name: str, what: str) -> Iterator[Metric]:
    if age is not None:
        yield _gauge(f"{name}_age_seconds", f"Age of what is told of {what}", age)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"devmapper_{name}", text, value)


def _text(value: str) -> str:
    """Names are bytes: what is no text is escaped, as everywhere."""
    return value.encode(errors="surrogateescape").decode(errors="backslashreplace")
