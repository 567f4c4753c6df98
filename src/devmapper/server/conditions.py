"""What may be wrong with a pool, in one sentence each, and what to do about it.

No I/O: the watch logs these, `/healthz` and `devmapper top` show them.
"""

from collections.abc import Collection
from enum import StrEnum
from typing import Final, NamedTuple

from devmapper.deviceset.status import DiskUsage
from devmapper.engine.port import PoolMode
from devmapper.errors import UsageError
from devmapper.server.observer import PoolReading
from devmapper.server.sampling import Sample
from devmapper.units import human_size

_RELIEF: Final = 1.1  # a warning ends at a tenth more than what it began at


class Condition(StrEnum):
    """What keeps a pool from working, or soon will; the worst come first."""

    SILENT = "silent"
    FAILED = "failed"
    READ_ONLY = "read_only"
    NEEDS_CHECK = "needs_check"
    OUT_OF_DATA_SPACE = "out_of_data_space"
    LOW_DATA = "low_data"
    LOW_METADATA = "low_metadata"


WARNINGS: Final = frozenset({Condition.LOW_DATA, Condition.LOW_METADATA})  # the pool still works

_MORE_DATA: Final = "remove layers, or enlarge the pool with devmapper pool resize"
_HINTS: Final = {
    Condition.SILENT: "devmapper engine status says if the engine runs; the kernel's log may say"
    " why it does not answer",
    Condition.FAILED: "stop what uses it and look at the log for the device that failed;"
    " devmapper pool check tells what is left",
    Condition.READ_ONLY: "look at the log for the device that failed, or for who opened it so",
    Condition.NEEDS_CHECK: "stop the engine, then devmapper pool check --clear-needs-check",
    Condition.OUT_OF_DATA_SPACE: f"writes to new blocks wait, and then fail: {_MORE_DATA}",
    Condition.LOW_DATA: _MORE_DATA,
    Condition.LOW_METADATA: "remove layers, or devmapper pool resize --metadata SIZE: a pool"
    " without free metadata turns read-only",
}


class Thresholds(NamedTuple):
    """Percent of each half that should be free; 0 says nothing."""

    data: float = 10.0
    metadata: float = 10.0

    def check(self) -> None:
        """`UsageError` for what is no percentage."""
        for name, value in (
            ("data-low-water", self.data),
            ("metadata-low-water", self.metadata),
        ):
            if not 0 <= value <= 100:
                raise UsageError(f"{name} {value} is not between 0 and 100 percent")


class Remark(NamedTuple):
    """One condition of one pool, for people."""

    condition: Condition
    sentence: str
    hint: str


def remarks(
    sample: Sample[PoolReading],
    thresholds: Thresholds,
    before: Collection[Condition] = (),
) -> list[Remark]:
    """What is wrong with the pool now, the worst first.

    A shortage that was there *before* ends only when there is clearly more free again, so that a
    pool on the border is not told of over and over.  Of a pool that does not answer nothing else
    is said: what is known of it is old.
    """
    reading = sample.value
    if sample.error or reading is None:
        name = "the pool" if reading is None else f"pool {reading.status.pool_name}"
        return [_remark(Condition.SILENT, f"{name} does not tell its state: {sample.error}")]
    found = _about_mode(reading)
    for condition, word, usage, percent in (
        (Condition.LOW_DATA, "data", reading.status.data, thresholds.data),
        (Condition.LOW_METADATA, "metadata", reading.status.metadata, thresholds.metadata),
    ):
        mark = usage.total * percent / 100
        if condition is Condition.LOW_DATA and percent:
            mark = max(mark, reading.low_water)
        if _is_low(usage, mark, was_low=condition in before):
            free = human_size(usage.total - usage.used)
            sentence = (
                f"pool {reading.status.pool_name} is low on {word}: {free} of"
                f" {human_size(usage.total)} are free"
            )
            found.append(_remark(condition, sentence))
    return found


def _is_low(usage: DiskUsage, mark: float, *, was_low: bool) -> bool:
    if usage.total == 0 or mark == 0:
        return False  # a failed pool does not tell, or nobody wants to know
    free = usage.total - usage.used
    return free <= (min(mark * _RELIEF, usage.total - 1) if was_low else mark)


def _about_mode(reading: PoolReading) -> list[Remark]:
    name = f"pool {reading.status.pool_name}"
    found = []
    match PoolMode(reading.status.mode):
        case PoolMode.WRITE:
            pass
        case PoolMode.FAIL:
            found.append(_remark(Condition.FAILED, f"{name} has failed: it does no I/O any more"))
        case PoolMode.READ_ONLY:
            found.append(_remark(Condition.READ_ONLY, f"{name} is read-only"))
        case PoolMode.OUT_OF_DATA_SPACE:
            found.append(_remark(Condition.OUT_OF_DATA_SPACE, f"{name} is out of data space"))
    if reading.status.needs_check:
        found.append(_remark(Condition.NEEDS_CHECK, f"the metadata of {name} need a check"))
    return found


def _remark(condition: Condition, sentence: str) -> Remark:
    return Remark(condition, sentence, _HINTS[condition])
