"""SIGKILL at every step of what changes a graph, on a real engine; a function of a factory.

The steps of an operation are noted while it runs once undisturbed, so a new one cannot be left out.
Then a child process runs the operation again and kills itself at one of them; what it leaves behind
is what a killed command leaves: records, an intent, active or suspended devices, loop devices.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.steps import Checkpoint, Step, no_checkpoint
from devmapper.engine.port import Activation, Engine
from devmapper.linux import loop, mount
from devmapper.units import MIB
from tests.support.graphs import check_consistent, records

OPTIONS = (
    "dm.loopdatasize=64M",
    "dm.loopmetadatasize=8M",
    "dm.basesize=32M",
    "dm.mkfsarg=-q",
    "dm.min_free_space=0%",
    "dm.override_udev_sync_check=true",
)

Operation = Callable[[DeviceSet], object]


class Killing:
    """A checkpoint that ends this process at *step* as the system would, once it is armed."""

    def __init__(self, step: Step, *, armed: bool = True) -> None:
        self._step = step
        self.armed = armed

    def __call__(self, step: Step) -> None:
        if self.armed and step is self._step:
            os.kill(os.getpid(), signal.SIGKILL)


class Noting:
    """A checkpoint that writes down what came by."""

    def __init__(self) -> None:
        self.seen: list[Step] = []

    def __call__(self, step: Step) -> None:
        if step not in self.seen:
            self.seen.append(step)


def run_killed(work: Callable[[], None]) -> None:
    """Run *work* in a child process, which has to die of SIGKILL in it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the step was not reached: wait status {status:#x}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def loop_devices_on(folder: Path) -> list[Path]:
    """The loop devices that stand on a file below *folder*."""
    return [node for node, file in loop.attached_devices() if str(file).startswith(f"{folder}/")]


class KillBase:
    """A graph for each test; a subclass names the engine (`make_engine`)."""

    def make_engine(self) -> Engine:
        raise NotImplementedError

    def open(self, home: Path, *options: str, checkpoint: Checkpoint = no_checkpoint) -> DeviceSet:
        engine = self.make_engine()
        return DeviceSet(home, (*OPTIONS, *options), engine=engine, checkpoint=checkpoint)

    @pytest.fixture
    def home(self, tmp_path: Path) -> Iterator[Path]:
        home = tmp_path / "graph"
        yield home
        with self.open(home) as devices:
            devices.shutdown()
        assert loop_devices_on(home) == []

    def check(self, home: Path, devices: DeviceSet) -> None:
        """Graph and pool agree, nothing is active that nobody asked for."""
        check_consistent(home, devices)
        assert [d.name for d in devices.pool.devices() if d.state is not Activation.ACTIVE] == []
        assert [d.name for d in devices.pool.devices() if not d.name.endswith("-mounted")] == []

    def kill_at_every_step(
        self,
        home: Path,
        operation: Operation,
        undo: Operation,
        *,
        after: Callable[[Step, DeviceSet], None],
    ) -> list[Step]:
        """Note the steps of *operation*, then kill it at each.

        *undo* brings the graph back to where the operation can be run again; *after* looks at what
        the next start made of the killed one.
        """
        noting = Noting()
        with self.open(home) as devices:
            undo(devices)
        with self.open(home, checkpoint=noting) as devices:
            noting.seen.clear()
            operation(devices)
        for step in noting.seen:
            with self.open(home) as devices:
                undo(devices)

            def work(step: Step = step) -> None:
                killing = Killing(step, armed=False)
                devices = self.open(home, checkpoint=killing)
                killing.armed = True
                operation(devices)

            run_killed(work)
            with self.open(home) as devices:
                check_consistent(home, devices)
                after(step, devices)
                self.check(home, devices)
        return noting.seen


class KillSuite(KillBase):
    """What changes layers."""

    def test_the_first_start(self, home: Path, tmp_path: Path) -> None:
        noting = Noting()
        with self.open(tmp_path / "noted", checkpoint=noting) as devices:
            devices.shutdown()
        assert {Step.POOL_ACTIVATED, Step.BASE_FORMATTED, Step.BASE_INITIALIZED} <= set(noting.seen)
        for step in noting.seen:
            folder = tmp_path / f"killed-{step}"

            def work(folder: Path = folder, step: Step = step) -> None:
                self.open(folder, checkpoint=Killing(step))

            run_killed(work)
            with self.open(folder) as devices:
                assert devices.list() == [""]
                assert records(folder)["base"]["initialized"]
                devices.add_device("one", "")
                self.check(folder, devices)
                devices.shutdown()
            assert loop_devices_on(folder) == []

    def test_creation(self, home: Path) -> None:
        def undo(devices: DeviceSet) -> None:
            if not devices.has_device("parent"):
                devices.add_device("parent", "")
            if devices.has_device("child"):
                devices.delete_device("child")

        def after(step: Step, devices: DeviceSet) -> None:
            assert devices.has_device("child") is (step is Step.COMMITTED)

        steps = self.kill_at_every_step(
            home, lambda devices: devices.add_device("child", "parent"), undo, after=after
        )
        assert Step.THIN_CREATED in steps

    def test_creation_from_a_mounted_layer(self, home: Path, tmp_path: Path) -> None:
        """The killed process leaves its origin suspended; the next one resumes it."""
        point = tmp_path / "mnt"
        point.mkdir()

        def undo(devices: DeviceSet) -> None:
            if not devices.has_device("mounted"):
                devices.add_device("mounted", "")
                devices.mount_device("mounted", point)
            if devices.has_device("child"):
                devices.delete_device("child")

        def after(step: Step, devices: DeviceSet) -> None:
            assert devices.has_device("child") is (step is Step.COMMITTED)
            (point / f"written-after-{step}").write_text("not frozen")
            os.sync()

        self.kill_at_every_step(
            home, lambda devices: devices.add_device("child", "mounted"), undo, after=after
        )

    def test_removal(self, home: Path) -> None:
        def undo(devices: DeviceSet) -> None:
            if not devices.has_device("one"):
                devices.add_device("one", "")

        def after(step: Step, devices: DeviceSet) -> None:
            assert not devices.has_device("one")

        steps = self.kill_at_every_step(
            home, lambda devices: devices.delete_device("one"), undo, after=after
        )
        assert Step.THIN_DELETED in steps

    def test_growing_the_pool(self, home: Path) -> None:
        data = iter(range(65 * MIB, 200 * MIB, MIB))
        metadata = iter(range(9 * MIB, 100 * MIB, MIB))
        wanted = [64 * MIB, 8 * MIB]

        def undo(_devices: DeviceSet) -> None:
            wanted[:] = [next(data), next(metadata)]

        def grow(devices: DeviceSet) -> None:
            devices.resize_pool(wanted[0], metadata_size=wanted[1])

        def after(_step: Step, devices: DeviceSet) -> None:
            grow(devices)  # the same call again completes it
            status = devices.status()
            assert [status.data.total, status.metadata.total] == wanted

        steps = self.kill_at_every_step(home, grow, undo, after=after)
        assert {Step.METADATA_FILE_GROWN, Step.DATA_GROWN} <= set(steps)

    def test_creation_with_a_size_of_its_own(self, home: Path) -> None:
        def undo(devices: DeviceSet) -> None:
            if devices.has_device("large"):
                devices.delete_device("large")

        def after(step: Step, devices: DeviceSet) -> None:
            assert devices.has_device("large") is (step is Step.LAYER_COMPLETED)
            if step is not Step.LAYER_COMPLETED:
                devices.add_device("large", "", size=48 * MIB)
            elif devices.has_activated_device("large"):
                devices.unmount_device("large")  # a whole layer, whose device is idle
            assert devices.dev_info("large").size == 48 * MIB

        steps = self.kill_at_every_step(
            home, lambda devices: devices.add_device("large", "", size=48 * MIB), undo, after=after
        )
        assert {Step.LAYER_GROWN, Step.LAYER_COMPLETED} <= set(steps)

    def test_growing_the_base(self, home: Path, tmp_path: Path) -> None:
        larger = "dm.basesize=48M"
        noting = Noting()
        with self.open(tmp_path / "noted") as devices:
            devices.add_device("one", "")
        with self.open(tmp_path / "noted", larger, checkpoint=noting) as devices:
            devices.shutdown()
        assert {Step.BASE_SIZE_RECORDED, Step.BASE_GROWN} <= set(noting.seen)
        for step in noting.seen:
            folder = tmp_path / f"killed-{step}"
            with self.open(folder) as devices:
                devices.add_device("one", "")

            def work(folder: Path = folder, step: Step = step) -> None:
                self.open(folder, larger, checkpoint=Killing(step))

            run_killed(work)
            with self.open(folder, larger) as devices:
                self.check(folder, devices)
                devices.add_device("two", "")
                sizes = [devices.dev_info(layer).size for layer in ("", "one", "two")]
                assert sizes == [48 * MIB, 32 * MIB, 48 * MIB]
                self.check(folder, devices)
                devices.shutdown()
            assert loop_devices_on(folder) == []

    def test_a_deletion_that_is_put_off(self, home: Path, tmp_path: Path) -> None:
        """The layer is gone for everybody from the first step on, its device with its last user."""
        deferred = ("dm.use_deferred_removal=true", "dm.use_deferred_deletion=true")
        point = tmp_path / "mnt"
        point.mkdir()
        for step in (Step.LAYER_DOOMED, Step.REMOVAL_DEFERRED):

            def work(step: Step = step) -> None:
                devices = self.open(home, *deferred)
                devices.add_device("held", "")
                devices.mount_device("held", point)
                devices.close()
                self.open(home, *deferred, checkpoint=Killing(step)).delete_device("held")

            run_killed(work)
            with self.open(home, *deferred) as devices:
                assert devices.list() == [""]
                check_consistent(home, devices)
            mount.unmount(point)
            with self.open(home, *deferred) as devices:
                assert set(records(home)) == {"base"}
                self.check(home, devices)
