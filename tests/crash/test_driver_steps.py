"""A crash at every step: of making a graph, making, growing and deleting a layer, growing the pool.

The steps come from the code (`Step`), so that a new one without a place here fails a test.  Each is
tried with a pool that commits as late as it may, with one that commits after every message, and
with an engine that outlives the command.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.names import GraphNames
from devmapper.deviceset.steps import Step
from devmapper.linux.fs_geometry import geometry
from devmapper.units import MIB, Bytes, ThinId
from tests.support.graphs import (
    CrashAt,
    SimulatedCrash,
    check_consistent,
    hold_open,
    make_legacy,
    make_two_layers,
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
SIZED_CREATION = [*CREATION, Step.LAYER_GROWN, Step.LAYER_COMPLETED]
BASE_GROWTH = [Step.BASE_SIZE_RECORDED, Step.BASE_GROWN, Step.BASE_GROWTH_RECORDED]
PUT_OFF = [Step.LAYER_DOOMED, Step.REMOVAL_DEFERRED]
MIGRATION = [Step.LAYER_MIGRATED, Step.LAYER_MIGRATED, Step.LAYER_MIGRATED, Step.LEGACY_MIGRATED]
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
        self.engine = LocalEngine(eager=kind == "early commit", deferred_removal=True)
        self._lives_on = kind == "engine lives on"

    def crash(
        self,
        home: Path,
        step: Step,
        operation: Callable[[DeviceSet], object] | None,
        *options: str,
        nth: int = 1,
    ) -> list[Step]:
        """Run *operation* on the graph (None: open it) until it crashes at *step*."""
        crash = CrashAt(step, nth=nth)
        if operation is None:
            with pytest.raises(SimulatedCrash):
                open_small(home, self.engine, *options, checkpoint=crash)
        else:
            devices = open_small(home, self.engine, *options, checkpoint=crash)
            with pytest.raises(SimulatedCrash):
                operation(devices)
        self.lose_power()
        return crash.seen

    def lose_power(self) -> None:
        if not self._lives_on:
            self.engine.crash()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_two_layers(tmp_path_factory.mktemp("template"))


@pytest.fixture
def graph(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "graph"))


def check_grown(devices: DeviceSet, layer: str, size: int) -> None:
    """The record has the size, and the file system fills the device."""
    info = devices.dev_info(layer)
    assert info.size == size
    name = info.name()
    was_active = devices.has_activated_device(layer)
    device = devices.pool.activate(name, ThinId(info.device_id), Bytes(size))
    found = geometry(device)
    assert found.size == size
    assert subprocess.run(["e2fsck", "-fn", device], capture_output=True).returncode == 0
    if not was_active:
        devices.pool.deactivate(name)


def test_every_step_of_the_code_is_crashed_at():
    creations = {*FIRST_START, *CREATION, *SIZED_CREATION, *BASE_GROWTH, *GROWTH}
    assert {*creations, *DELETION, *PUT_OFF, *MIGRATION, *RECOVERY, Step.RECORD_REWRITTEN} == set(
        Step
    )


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
    devices.add_device("large", "", size=16 * MIB)
    assert seen.seen == SIZED_CREATION
    seen.seen.clear()
    grow(devices)
    assert seen.seen == GROWTH
    devices.shutdown()
    seen.seen.clear()
    with open_small(tmp_path, engine, "dm.basesize=16M", checkpoint=seen) as devices:
        assert seen.seen == [Step.POOL_ACTIVATED, *BASE_GROWTH]
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


@pytest.mark.parametrize("step", SIZED_CREATION)
def test_creation_of_a_layer_that_is_larger(graph, machine, step):
    """It is there with its whole file system, or it is not there."""
    machine.crash(graph, step, lambda devices: devices.add_device("three", "two", size=16 * MIB))
    with open_small(graph, machine.engine) as devices:
        exists = step is Step.LAYER_COMPLETED
        assert devices.has_device("three") is exists
        assert ("three" in records(graph)) is exists
        check_consistent(graph, devices)
        if not exists:
            devices.add_device("three", "two", size=16 * MIB)
        check_grown(devices, "three", 16 * MIB)
        check_consistent(graph, devices)


@pytest.mark.parametrize("step", BASE_GROWTH)
@pytest.mark.parametrize("again", [None, "16M", "24M"])
def test_growth_of_the_base(graph, machine, step, again):
    """It is completed by the next start, whether that has the option again or not."""
    machine.crash(graph, step, None, "dm.basesize=16M")
    with open_small(graph, machine.engine, base_size=again) as devices:
        size = 24 * MIB if again == "24M" else 16 * MIB
        check_grown(devices, "", size)
        assert set(records(graph)["base"]) == {
            "device_id", "size", "transaction_id", "initialized", "deleted",
        }  # fmt: skip
        devices.add_device("new", "")
        check_grown(devices, "new", size)
        assert records(graph)["one"]["size"] == 8 * MIB
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


DEFERRED = ("dm.use_deferred_removal=true", "dm.use_deferred_deletion=true")


@pytest.mark.parametrize("step", PUT_OFF)
def test_deletion_of_a_layer_in_use(graph, machine, step):
    """What was told to be gone is gone for everybody, and its thin device with its last user."""

    def delete(devices: DeviceSet) -> None:
        hold_open(devices, machine.engine, "one")
        devices.delete_device("one")

    machine.crash(graph, step, delete, *DEFERRED)
    with open_small(graph, machine.engine, *DEFERRED) as devices:
        assert devices.list() == ["", "two"]
        check_consistent(graph, devices)
        for pool in machine.engine.pools.values():
            pool.in_use.clear()
    with open_small(graph, machine.engine) as devices:
        assert set(records(graph)) == {"base", "two"}
        assert devices.pool.devices() == []
        check_consistent(graph, devices)
        devices.add_device("one", "two")
        check_consistent(graph, devices)


@pytest.mark.parametrize(("step", "nth"), [(s, MIGRATION[:n].count(s)) for n, s in
                                           enumerate(MIGRATION, start=1)])  # fmt: skip
def test_migration_of_the_legacy_file(graph, machine, step, nth):
    expected = make_legacy(graph)
    machine.crash(graph, step, None, nth=nth)
    with open_small(graph, machine.engine) as devices:
        assert records(graph) == expected
        assert not (graph / "devicemapper" / "json").exists()
        assert (graph / "devicemapper" / "json.migrated").exists()
        check_consistent(graph, devices)
        devices.add_device("three", "two")
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


def test_migration_passes_these_steps_and_comes_before_recovery(graph):
    make_legacy(graph)
    engine = LocalEngine()
    seen = CrashAt(None)
    with open_small(graph, engine, checkpoint=seen):
        assert seen.seen == [Step.POOL_ACTIVATED, *MIGRATION]
    engine.crash()


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
