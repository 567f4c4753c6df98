"""A frame of `devmapper top`: an overview as text of some width and height.  No I/O."""

import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from devmapper.cli.output import printable
from devmapper.deviceset.status import DiskUsage
from devmapper.engine.port import PoolMode
from devmapper.server.conditions import WARNINGS
from devmapper.server.observer import LayerReading
from devmapper.server.overview import Bucket, OperationCounts, Overview
from devmapper.units import human_size

_NARROW: Final = 60  # below that some columns are left out
_WIDE: Final = 80
_MIN_ROWS: Final = 3  # of layers
_MOST_OPERATIONS: Final = 8  # rows on a screen
_ALMOST: Final = 0.9
_SHORTEST_BAR: Final = 5


class Activity(NamedTuple):
    """What one kind of request did between two looks, or since the daemon started."""

    front_end: str
    operation: str
    rate: float | None  # a second; None where there is no look before
    median: float | None  # seconds; None if nothing ended
    slow: float | None  # 99 of 100 took less
    errors: int  # since the daemon started
    under_way: int


def frame(
    overview: Overview, before: Overview | None, *, width: int, height: int | None
) -> RenderableType:
    """What *overview* looks like; rates are against *before*.  Without *height* all is shown."""
    parts: list[RenderableType] = [_title(overview, width)]
    parts += _pool(overview, width)
    for remark in overview.remarks:
        style = "yellow" if remark.condition in WARNINGS else "bold red"
        parts.append(_line(f"! {remark.sentence}", width, style))
        parts.append(_line(f"  {remark.hint}", width, "dim"))
    if overview.layers_error:
        parts.append(_line(f"! layers: {overview.layers_error}", width, "yellow"))
    activities = sorted(
        activity(overview, before), key=lambda each: (-(each.rate or 0), -each.under_way)
    )
    if height is not None:
        activities = activities[:_MOST_OPERATIONS]
    below: list[RenderableType] = [Text(""), _operations(activities, width)] if activities else []
    room = None
    if height is not None:
        used = len(parts) + 2 + (len(activities) + 2 if activities else 0)
        room = max(height - used, _MIN_ROWS)
    return Group(*parts, Text(""), _layers(overview.layers, width, room), *below)


def activity(overview: Overview, before: Overview | None) -> list[Activity]:
    """What the requests did since *before*; all of it if the daemon is another one by now."""
    earlier = (
        {(each.front_end, each.operation): each for each in before.operations} if before else {}
    )
    seconds = overview.taken - before.taken if before else 0.0
    found = []
    for now in overview.operations:
        then = earlier.get((now.front_end, now.operation))
        if then is None or then.ended > now.ended:
            then = now._replace(ended=0, buckets=())
        counts = _difference(now, then)
        ended = now.ended - then.ended
        found.append(
            Activity(
                now.front_end,
                now.operation,
                ended / seconds if seconds > 0 else None,
                quantile(0.5, counts, ended),
                quantile(0.99, counts, ended),
                now.errors,
                now.under_way,
            )
        )
    return found


def quantile(part: float, buckets: Sequence[Bucket], ended: int) -> float | None:
    """Seconds within which *part* of the requests ended, between two limits as on a line.

    As Prometheus' histogram_quantile: beyond the last limit it is that limit.
    """
    if ended <= 0 or not buckets:
        return None
    wanted = part * ended
    lower, below = 0.0, 0
    for bucket in buckets:
        if bucket.within >= wanted:
            inside = bucket.within - below
            share = (wanted - below) / inside if inside else 1.0
            return lower + (bucket.limit - lower) * share
        lower, below = bucket.limit, bucket.within
    return lower


def _difference(now: OperationCounts, then: OperationCounts) -> list[Bucket]:
    old = {bucket.limit: bucket.within for bucket in then.buckets}
    return [each._replace(within=each.within - old.get(each.limit, 0)) for each in now.buckets]


def _title(overview: Overview, width: int) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(overview.taken))
    source = "daemon" if overview.served else "no daemon"
    return _line(f"devmapper {overview.version}  {clock}  {source}  {overview.home}", width, "bold")


def _pool(overview: Overview, width: int) -> list[RenderableType]:
    reading = overview.pool
    if reading is None:
        return []
    status = reading.status
    words = [f"pool {status.pool_name}", status.engine, f"mode {status.mode}"]
    if status.needs_check:
        words.append("needs_check")
    words += [f"transaction {status.transaction_id}", f"{reading.active} active"]
    if status.deferred_deleted_count:
        words.append(f"{status.deferred_deleted_count} put off")
    if any(remark.condition == "silent" for remark in overview.remarks):
        words.append(f"{overview.pool_age:.0f} s ago")
    style = "" if status.mode == PoolMode.WRITE else "red"
    lines: list[RenderableType] = [_line("  ".join(words), width, style)]
    if status.data.total:  # a pool that has failed does not tell
        lines += _bars((("data", status.data), ("metadata", status.metadata)), width)
    return lines


def _bars(halves: Sequence[tuple[str, DiskUsage]], width: int) -> list[Text]:
    numbers = [
        f" {usage.used / usage.total:6.1%}  {human_size(usage.used)} of {human_size(usage.total)}"
        for _, usage in halves
    ]
    longest = max(map(len, numbers))
    room = width - longest - len("metadata  []")
    return [
        _bar(name, usage.used / usage.total, words.ljust(longest), room, width)
        for (name, usage), words in zip(halves, numbers, strict=True)
    ]


def _bar(name: str, share: float, numbers: str, room: int, width: int) -> Text:
    bar = Text(f"{name:<9} ", no_wrap=True, overflow="ellipsis")
    if room >= _SHORTEST_BAR:
        filled = min(round(room * share), room)
        bar.append("[")
        bar.append("|" * filled, "red" if share >= _ALMOST else "green")
        bar.append(" " * (room - filled))
        bar.append("]")
    bar.append(numbers)
    bar.truncate(width, overflow="ellipsis")
    return bar


def _layers(layers: Sequence[LayerReading], width: int, room: int | None) -> Table:
    table = _table()
    table.add_column("LAYER", no_wrap=True, overflow="ellipsis", ratio=1)
    if width >= _NARROW:
        table.add_column("OWNER", no_wrap=True)
    table.add_column("EXCLUSIVE", justify="right", no_wrap=True)
    if width >= _NARROW:
        table.add_column("MAPPED", justify="right", no_wrap=True)
    if width >= _WIDE:
        table.add_column("SIZE", justify="right", no_wrap=True)
    table.add_column("STATE", no_wrap=True)
    shown = layers if room is None or len(layers) <= room else layers[: room - 1]
    for layer in shown:
        table.add_row(*map(Text, _cells(layer, width)))
    if len(shown) < len(layers):
        table.add_row(Text(f"and {len(layers) - len(shown)} more", "dim"))
    return table


def _cells(layer: LayerReading, width: int) -> list[str]:
    cells = [printable(layer.snapshot or layer.id)]
    if width >= _NARROW:
        cells.append(layer.owner)
    cells.append(human_size(layer.exclusive))
    if width >= _NARROW:
        cells.append(human_size(layer.mapped))
    if width >= _WIDE:
        cells.append(human_size(layer.size))
    return [*cells, "mounted" if layer.mounted else "active" if layer.active else "-"]


def _operations(activities: Sequence[Activity], width: int) -> Table:
    table = _table()
    table.add_column("OPERATION", no_wrap=True, overflow="ellipsis", ratio=1)
    titles = ["RATE/S", "P50", "P99", "ERRORS", "NOW"]
    if width < _NARROW:
        titles = ["RATE/S", "P99", "NOW"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for each in activities:
        cells = {
            "RATE/S": "-" if each.rate is None else f"{each.rate:.1f}",
            "P50": _duration(each.median),
            "P99": _duration(each.slow),
            "ERRORS": str(each.errors),
            "NOW": str(each.under_way),
        }
        name = f"{each.front_end} {each.operation}"
        table.add_row(Text(name), *(Text(cells[title]) for title in titles))
    return table


def _table() -> Table:
    return Table(box=None, expand=True, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _line(text: str, width: int, style: str = "") -> Text:
    line = Text(printable(text), style, no_wrap=True, overflow="ellipsis")
    line.truncate(width, overflow="ellipsis")
    return line
