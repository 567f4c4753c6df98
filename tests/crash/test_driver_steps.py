"""A crash at every step of making a graph, making a layer, deleting one and growing the pool.

The steps come from the code (`Step`), so that a new one without a place here fails a test.  Each is
tried with a pool that commits as late as it may, with one that commits after every message, and
with an engine that outlives the command.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.names import GraphNames
from devmapper.deviceset.steps import Step
from devmapper.units import MIB
from tests.support.graphs import (
    CrashAt,
    SimulatedCrash,
    check_consistent,
    open_small,
    records,
)
from tests.support.local_engine import LocalEngine

FIRST_START = [
    Step.DATA_FILE_MADE,
    Step.METADATA_FILE_MADE,
    Step.POOL_ACTIVATED,
    Step.INTENT_WRITTEN,
    Step.THIN_CREATED,
    Step.RECORD_SAVED,
    Step.COMMITTED,
    Step.BASE_ACTIVATED,
    Step.BASE_FORMATTED,
    Step.BASE_DEACTIVATED,
    Step.BASE_IDENTIFIED,
    Step.BASE_INITIALIZED,
]
CREATION = [Step.INTENT_WRITTEN, Step.THIN_CREATED, Step.RECORD_SAVED, Step.COMMITTED]
DELETION = [
    Step.LAYER_DOOMED,
    Step.THIN_DISCARDED,
    Step.INTENT_WRITTEN,
    Step.THIN_DELETED,
    Step.RECORD_REMOVED,
    Step.COMMITTED,
]
GROWTH = [
    Step.METADATA_FILE_GROWN,
    Step.METADATA_GROWN,
    Step.DATA_FILE_GROWN,
    Step.DATA_GROWN,
]
RECOVERY = [Step.RECOVERED_THIN, Step.RECOVERED_RECORD, Step.RECOVERED]

LARGER = 8 * MIB

POOLS = ["late commit", "early commit", "engine lives on"]


@pytest.fixture(params=POOLS)
def machine(request):
    machine = Machine(request.param)
    yield machine
    machine.engine.crash()


class Machine:
    """What survives a crash of the command: the engine, or only what its pool had committed."""

    def __init__(self, kind: str) -> None:
        self.engine = LocalEngine(eager=kind == "early commit")
        self._lives_on = kind == "engine lives on"

    def crash(
        self, home: Path, step: Step, operation: Callable[[DeviceSet], None] | None
    ) -> list[Step]:
        """Run *operation* on the graph (None: open it) until it crashes at *step*."""
        crash = CrashAt(step)
        if operation is None:
            with pytest.raises(SimulatedCrash):
                open_small(home, self.engine, checkpoint=crash)
        else:
            devices = open_small(home, self.engine, checkpoint=crash)
            with pytest.raises(SimulatedCrash):
                operation(devices)
        self.lose_power()
        return crash.seen

    def lose_power(self) -> None:
        if not self._lives_on:
            self.engine.crash()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A graph with two layers; nothing on disk depends on where it lies."""
    home = tmp_path_factory.mktemp("template")
    with open_small(home, LocalEngine()) as devices:
        devices.add_device("one", "")
        devices.add_device("two", "one")
        devices.shutdown()
    return home


@pytest.fixture
def graph(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "graph"))


def test_every_step_of_the_code_is_crashed_at():
    assert {*FIRST_START, *CREATION, *DELETION, *GROWTH, *RECOVERY} == set(Step)


def test_the_operations_pass_these_steps_and_no_others(tmp_path):
    engine = LocalEngine()
    seen = CrashAt(None)
    devices = open_small(tmp_path, engine, checkpoint=seen)
    assert seen.seen == FIRST_START
    seen.seen.clear()
    devices.add_device("one", "")
    assert seen.seen == CREATION
    seen.seen.clear()
    devices.delete_device("one")
    assert seen.seen == DELETION
    seen.seen.clear()
    grow(devices)
    assert seen.seen == GROWTH
    devices.shutdown()


@pytest.mark.parametrize("step", FIRST_START)
def test_first_start(tmp_path, machine, step):
    machine.crash(tmp_path, step, None)
    with open_small(tmp_path, machine.engine) as devices:
        assert devices.list() == [""]
        assert records(tmp_path)["base"]["initialized"]
        check_consistent(tmp_path, devices)
        devices.add_device("one", "")
        check_consistent(tmp_path, devices)


@pytest.mark.parametrize("step", CREATION)
def test_creation(graph, machine, step):
    machine.crash(graph, step, lambda devices: devices.add_device("three", "two"))
    with open_small(graph, machine.engine) as devices:
        exists = step is Step.COMMITTED
        assert devices.has_device("three") is exists
        check_consistent(graph, devices)
        if not exists:
            devices.add_device("three", "two")
        assert devices.list() == ["", "one", "three", "two"]
        check_consistent(graph, devices)


@pytest.mark.parametrize("step", DELETION)
def test_deletion(graph, machine, step):
    """Whoever saw the deletion begin sees it complete: it is never half a layer."""
    machine.crash(graph, step, lambda devices: devices.delete_device("one"))
    with open_small(graph, machine.engine) as devices:
        assert not devices.has_device("one")
        assert devices.list() == ["", "two"]
        assert set(records(graph)) == {"base", "two"}
        assert devices.pool.info(GraphNames.of(graph).prefix + "-one") is None
        check_consistent(graph, devices)
        devices.add_device("one", "two")
        check_consistent(graph, devices)


def grow(devices: DeviceSet) -> None:
    devices.resize_pool(LARGER, metadata_size=LARGER)


def check_size(home: Path, devices: DeviceSet) -> tuple[int, int]:
    """The pool has what its files have; returns the sizes of data and metadata."""
    folder = home / "devicemapper"
    data, metadata = ((folder / name).stat().st_size for name in ("data", "metadata"))
    status = devices.pool.status()
    assert status.total_data_blocks * status.block_size == data
    assert status.total_metadata_blocks * 4096 == metadata
    check_consistent(home, devices)
    return data, metadata


@pytest.mark.parametrize("step", GROWTH)
def test_growth(graph, machine, step):
    """The next start completes what has begun, and the same call the rest."""
    machine.crash(graph, step, grow)
    reached = GROWTH.index(step)
    with open_small(graph, machine.engine) as devices:
        data, metadata = check_size(graph, devices)
        assert metadata == LARGER
        assert data == (LARGER if reached >= GROWTH.index(Step.DATA_FILE_GROWN) else 4 * MIB)
        grow(devices)
        assert check_size(graph, devices) == (LARGER, LARGER)
        devices.add_device("three", "two")
        check_consistent(graph, devices)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("step", [Step.METADATA_FILE_GROWN, Step.DATA_FILE_GROWN])
def test_growth_by_option_at_a_start(graph, machine, step, running):
    larger = [f"dm.loopdatasize={LARGER}", f"dm.loopmetadatasize={LARGER}"]
    if running:
        open_small(graph, machine.engine).close()
    crash = CrashAt(step)
    with pytest.raises(SimulatedCrash):
        open_small(graph, machine.engine, *larger, checkpoint=crash)
    machine.lose_power()
    with open_small(graph, machine.engine, *larger) as devices:
        assert check_size(graph, devices) == (LARGER, LARGER)


@pytest.mark.parametrize("again", RECOVERY)
@pytest.mark.parametrize("step", [Step.THIN_CREATED, Step.RECORD_SAVED])
def test_recovery_itself_is_interrupted(graph, machine, step, again):
    machine.crash(graph, step, lambda devices: devices.add_device("three", "two"))
    machine.crash(graph, again, None)
    with open_small(graph, machine.engine) as devices:
        assert devices.list() == ["", "one", "two"]
        check_consistent(graph, devices)


def test_crash_after_crash(tmp_path, machine):
    """Every step of everything, one crash after the other, on the same graph."""
    for step in FIRST_START[3:]:
        machine.crash(tmp_path, step, None)
    for step in CREATION:
        name = f"made-{step}"
        machine.crash(tmp_path, step, lambda devices, name=name: devices.add_device(name, ""))
    for step in DELETION:
        with open_small(tmp_path, machine.engine) as devices:
            devices.add_device(f"deleted-{step}", "")
        name = f"deleted-{step}"
        machine.crash(tmp_path, step, lambda devices, name=name: devices.delete_device(name))
    with open_small(tmp_path, machine.engine) as devices:
        assert devices.list() == ["", "made-committed"]
        check_consistent(tmp_path, devices)
