"""Graphs for tests: small, and looked at afterwards with eyes of their own."""

import json
import tempfile
from pathlib import Path

from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.steps import Checkpoint, Step, no_checkpoint
from devmapper.units import Bytes, ThinId
from tests.support import capabilities, thin_tools
from tests.support.local_engine import LocalEngine, LocalPool

SMALL = (
    "dm.loopdatasize=4M",
    "dm.loopmetadatasize=4M",
    "dm.mkfsarg=-q",
)
BASE_SIZE = "8M"


class SimulatedCrash(BaseException):
    """No `Exception`: nothing on its way may tidy up."""


class CrashAt:
    """A checkpoint that crashes when *step* comes up for the *nth* time, and notes what came up."""

    def __init__(self, step: Step | None, *, nth: int = 1) -> None:
        self._step = step
        self._left = nth
        self.seen: list[Step] = []

    def __call__(self, step: Step) -> None:
        self.seen.append(step)
        if step is self._step:
            self._left -= 1
            if self._left == 0:
                raise SimulatedCrash


def open_small(
    home: Path,
    engine: LocalEngine,
    *options: str,
    base_size: str | None = BASE_SIZE,
    checkpoint: Checkpoint = no_checkpoint,
    deletion_interval: float = 3600,
) -> DeviceSet:
    """A graph with a base of 8 MiB; None as *base_size* leaves that as it is."""
    return DeviceSet(
        home,
        [*SMALL, *([f"dm.basesize={base_size}"] if base_size else []), *options],
        engine=engine,
        checkpoint=checkpoint,
        deletion_interval=deletion_interval,
    )


def make_two_layers(home: Path) -> Path:
    """A graph with the layers "one" and "two"; nothing on disk depends on where it lies."""
    with open_small(home, LocalEngine()) as devices:
        devices.add_device("one", "")
        devices.add_device("two", "one")
        devices.shutdown()
    return home


def records(home: Path) -> dict[str, dict[str, object]]:
    """The layers' records as they lie on disk."""
    found = {}
    for path in (home / "metadata").iterdir():
        if path.name not in ("deviceset-metadata", "transaction-metadata"):
            assert not path.name.startswith(".tmp"), "a temporary file was left"
            found[path.name] = json.loads(path.read_bytes())
    return found


def check_consistent(home: Path, devices: DeviceSet) -> None:
    """No thin id without a record, no record without a thin id, thin_check clean."""
    devices.pool.commit()
    present = set(devices.pool.thin_ids())
    ids = [record["device_id"] for record in records(home).values()]
    assert len(ids) == len(set(ids)), "two layers share a thin id"
    assert set(ids) == present
    assert list(devices.inconsistencies()) == []
    with tempfile.TemporaryDirectory(dir=home.parent) as folder:
        devices.pool.export_metadata(Path(folder) / "metadata")
        if not capabilities.tools():
            assert thin_tools.thin_check(Path(folder) / "metadata")


def hold_open(devices: DeviceSet, engine: LocalEngine, layer: str) -> LocalPool:
    """Activate *layer* as if somebody in another mount namespace used it; returns the pool."""
    info = devices.dev_info(layer)
    (pool,) = engine.pools.values()
    pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
    pool.in_use.add(info.name())
    return pool


def make_legacy(home: Path) -> dict[str, dict[str, object]]:
    """Turn the records of a graph that is not open into the one file of early Docker versions."""
    found = records(home)
    old = {"" if name == "base" else name: dict(record) for name, record in found.items()}
    for record in old.values():
        del record["deleted"]
    (home / "devicemapper" / "json").write_text(json.dumps({"Devices": old}))
    for path in (home / "metadata").iterdir():
        path.unlink()
    return found
