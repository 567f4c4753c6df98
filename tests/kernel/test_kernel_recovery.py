"""What a killed process leaves behind in the kernel, and how the next one goes on from there."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from devmapper.engine.kernel import devices, tableline
from devmapper.engine.kernel.engine import KernelEngine
from devmapper.engine.kernel.pool import KernelPool
from devmapper.engine.port import Activation, Outcome
from devmapper.errors import ThinBusy
from devmapper.linux import libdm
from devmapper.linux.libdm import TaskKind
from devmapper.units import MIB, Bytes, ThinId
from tests.conformance.engine_suite import make_file_system, mounted, write
from tests.kernel.conftest import POOL, check
from tests.support import dm, programs
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kernel

ONE, TWO = ThinId(1), ThinId(2)
SIZE = Bytes(32 * MIB)

# Suspends the device and waits: to be killed, or to be told to end
SUSPENDER = """
import sys
from devmapper.engine.kernel.engine import KernelEngine
pool = KernelEngine().find_pool(sys.argv[1])
with pool.suspended(sys.argv[2]):
    print("suspended", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def one(pool: KernelPool) -> Path:
    pool.create_thin(ONE)
    return pool.activate("one", ONE, SIZE)


def state_of(pool: KernelPool, name: str) -> Activation:
    info = pool.info(name)
    return Activation.ABSENT if info is None else info.state


def kill_while_suspended(name: str) -> None:
    with programs.program(SUSPENDER, POOL, name) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "suspended\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL


class TestSuspension:
    def test_a_mounted_device_goes_on_when_the_pool_is_found(self, engine, pool, one, tmp_path):
        make_file_system("ext4", one)
        with mounted(one, tmp_path / "mnt") as target:
            kill_while_suspended("one")
            assert state_of(pool, "one") is Activation.SUSPENDED
            assert engine.find_pool(POOL) is not None
            assert state_of(pool, "one") is Activation.ACTIVE
            (target / "file").write_text("goes on")
            os.sync()

    def test_the_next_suspension_takes_it_over(self, pool, one):
        kill_while_suspended("one")
        with pool.suspended("one"):
            pool.create_snap(TWO, ONE)
        assert state_of(pool, "one") is Activation.ACTIVE

    def test_activating_it_resumes_it(self, pool, one):
        kill_while_suspended("one")
        assert pool.activate("one", ONE, SIZE) == one
        assert state_of(pool, "one") is Activation.ACTIVE

    def test_it_is_deactivated(self, pool, one):
        kill_while_suspended("one")
        dm.settle()
        assert pool.deactivate("one") is Outcome.DONE

    def test_what_a_living_process_has_suspended_stays_so(self, engine, pool, one):
        with programs.program(SUSPENDER, POOL, "one") as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "suspended\n"
            engine.find_pool(POOL)
            assert pool.activate("one", ONE, SIZE) == one
            with pytest.raises(ThinBusy, match="suspension"):
                pool.deactivate("one")
            with pytest.raises(ThinBusy):
                engine.deactivate_pool(POOL)
            assert state_of(pool, "one") is Activation.SUSPENDED
            child.communicate("go on\n", timeout=60)
            assert child.returncode == 0
        assert state_of(pool, "one") is Activation.ACTIVE

    def test_a_pool_that_was_left_suspended_goes_on(self, engine, pool, one):
        devices.suspend(POOL)  # as a kernel that could not take a new table leaves it
        assert engine.find_pool(POOL) is not None
        state = devices.find_state(POOL)
        assert state is not None
        assert not state.suspended
        write(one, 0, b"goes on")

    def test_a_device_that_is_removed_under_a_suspension_is_told(self, pool, one):
        with pytest.raises(Exception, match="could not be resumed"), pool.suspended("one"):
            devices.remove("one")


class TestActivation:
    def test_a_device_without_a_table_is_completed(self, pool):
        pool.create_thin(ONE)
        _create("one")
        assert pool.info("one") is None
        assert pool.devices() == []
        path = pool.activate("one", ONE, SIZE)
        write(path, 0, b"works")
        assert state_of(pool, "one") is Activation.ACTIVE

    def test_a_device_that_was_not_resumed_is_completed(self, pool):
        pool.create_thin(ONE)
        _create("one")
        devices.load("one", tableline.thin_target(POOL, ONE, SIZE))
        write(pool.activate("one", ONE, SIZE), 0, b"works")

    def test_half_made_devices_go_with_the_pool(self, engine, table):
        pool = engine.activate_pool(POOL, table)
        pool.create_thin(ONE)
        _create("one")
        devices.load("one", tableline.thin_target(POOL, ONE, SIZE))
        assert engine.deactivate_pool(POOL) is Outcome.DONE
        assert devices.find_state("one") is None

    def test_a_half_made_pool_is_made_anew(self, engine, table):
        _create(POOL)
        assert engine.find_pool(POOL) is None
        pool = engine.activate_pool(POOL, table)
        pool.create_thin(ONE)
        engine.deactivate_pool(POOL)
        check(table)

    def test_a_half_made_pool_is_removed(self, engine):
        _create(POOL)
        assert engine.deactivate_pool(POOL) is Outcome.ALREADY
        assert devices.find_state(POOL) is None


class TestThreads:
    def test_a_suspension_that_waits_holds_up_nobody(self, engine, tmp_path):
        """A full pool holds I/O for a while, and whoever wants to suspend a device waits for it."""
        table = dm.make_table(tmp_path, data_size=Bytes(8 * MIB))
        pool = engine.activate_pool(POOL, table)
        pool.create_thin(ONE)
        device = pool.activate("one", ONE, SIZE)
        program = (
            "import os, sys; fd = os.open(sys.argv[1], os.O_WRONLY);"
            "os.pwrite(fd, b'x' * (16 << 20), 0); os.fsync(fd)"
        )
        suspended = threading.Event()

        def suspend() -> None:
            with pool.suspended("one"):
                suspended.set()

        with _no_space_timeout(4), programs.program(program, str(device)) as writer:
            wait_for(lambda: pool.status().mode == "out_of_data_space")
            thread = threading.Thread(target=suspend)
            thread.start()
            assert not suspended.wait(0.3)
            pool.create_thin(TWO)
            assert pool.activate("two", TWO, SIZE).is_block_device()
            assert pool.thin_ids() == [ONE, TWO]
            assert not suspended.is_set()
            assert writer.wait(60) == 1
            thread.join(60)
        assert suspended.is_set()
        dm.settle()
        engine.deactivate_pool(POOL)
        check(table)

    def test_one_name_many_threads(self, pool, one):
        dm.settle()
        pool.deactivate("one")
        with ThreadPoolExecutor(6) as executor:
            paths = set(executor.map(lambda _: pool.activate("one", ONE, SIZE), range(12)))
        assert paths == {one}
        dm.settle()
        with ThreadPoolExecutor(6) as executor:
            outcomes = list(executor.map(lambda _: pool.deactivate("one"), range(12)))
        assert outcomes.count(Outcome.DONE) == 1
        assert outcomes.count(Outcome.ALREADY) == 11

    def test_one_pool_many_threads(self, engine, table):
        with ThreadPoolExecutor(6) as executor:
            pools = list(
                executor.map(lambda _: KernelEngine().activate_pool(POOL, table), range(12))
            )
        assert len({pool.table() for pool in pools}) == 1
        assert len(dm.loops_on(table.metadata_device, table.data_device)) == 2
        dm.settle()
        with ThreadPoolExecutor(6) as executor:
            outcomes = list(executor.map(lambda _: KernelEngine().deactivate_pool(POOL), range(12)))
        assert outcomes.count(Outcome.DONE) == 1
        check(table)


@contextmanager
def _no_space_timeout(seconds: int) -> Iterator[None]:
    """How long the kernel holds I/O to a full pool."""
    parameter = Path("/sys/module/dm_thin_pool/parameters/no_space_timeout")
    before = parameter.read_text()
    parameter.write_text(str(seconds))
    try:
        yield
    finally:
        parameter.write_text(before)


def _create(name: str) -> None:
    """A device as it is between two ioctls of its maker."""
    with libdm.task(TaskKind.CREATE, name) as task:
        task.run()
