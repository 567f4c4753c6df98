"""Killing the engine process equals pulling a disk: what was acknowledged is there afterwards.

`KILLS` (environment) says how often it is killed under load; a hundred times is the soak.
"""

import os
import random
import signal
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import devmapper
from devmapper.engine.embedded import leftovers as engine_leftovers
from devmapper.engine.embedded import runtime
from devmapper.engine.embedded.client import EmbeddedEngine, EmbeddedPoolClient
from devmapper.engine.port import Activation, Outcome
from devmapper.errors import (
    DevmapperError,
    EngineError,
    IntegrityError,
    LayerNotMounted,
    PoolBusy,
    ThinIdMissing,
)
from devmapper.linux import loop, mount, process
from devmapper.units import MIB, Bytes, ThinId, TransactionId
from tests.conformance.graphdriver_base import GRAPH
from tests.support import programs, thin_tools
from tests.support.engine_rig import POOL, Rig
from tests.support.leftovers import remaining
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.root, pytest.mark.fuse]

KILLS = int(os.environ.get("KILLS", "5"))
_KEPT = 20  # of the thin devices of one round
SIZE = Bytes(320 * MIB)
LAYERS = {"ext4": ThinId(1), "xfs": ThinId(2)}

WRITER = """
import os, sys
directory, first = sys.argv[1], int(sys.argv[2])
folder = os.open(directory, os.O_RDONLY)
number = first
try:
    while True:
        fd = os.open(f"{directory}/{number}", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"%d\\n" % number * 2000)
        os.fsync(fd)
        os.close(fd)
        os.fsync(folder)
        print(number, flush=True)
        number += 1
        if number - 40 >= first and number % 40 == 0:
            print("unlinking", number - 40, flush=True)
            for old in range(number - 40, number - 30):
                os.unlink(f"{directory}/{old}")
except OSError:
    pass
"""

STARTER = """
import sys
from pathlib import Path
from devmapper.engine.embedded.client import EmbeddedEngine
from devmapper.engine.port import PoolTable
name, metadata, data, size, block = sys.argv[1:]
print("go", flush=True)
table = PoolTable(Path(metadata), Path(data), int(size), int(block))
EmbeddedEngine().activate_pool(name, table)
print("started", flush=True)
"""

SUSPENDER = """
import sys, time
from devmapper.engine.embedded.client import EmbeddedEngine
with EmbeddedEngine().find_pool(sys.argv[1]).suspended(sys.argv[2]):
    print("suspended", flush=True)
    time.sleep(600)
"""

ACTIVATOR = """
import sys
from devmapper.engine.embedded.client import EmbeddedEngine
pool = EmbeddedEngine().find_pool(sys.argv[1])
for _ in range(20):
    print(pool.activate("shared", 7, int(sys.argv[2])), flush=True)
"""

COMER_AND_GOER = """
import os, sys
from devmapper.engine.embedded.client import EmbeddedEngine
from devmapper.errors import DevmapperError
pool, number = EmbeddedEngine().find_pool(sys.argv[1]), int(sys.argv[2])
name = f"device-{number}"
print("go", flush=True)
try:
    while True:
        pool.create_snap(number, 1)
        node = pool.activate(name, number, int(sys.argv[3]))
        fd = os.open(node, os.O_RDWR)
        os.pwrite(fd, b"x" * 100_000, 0)
        with pool.suspended(name):
            pass
        os.fsync(fd)
        os.close(fd)
        pool.deactivate(name)
        pool.delete(number)
except (DevmapperError, OSError) as err:
    print(f"{type(err).__name__}: {err}", flush=True)
"""

TOUCHER = """
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
os.write(fd, b"x")
os.fsync(fd)
print("done", flush=True)
"""


@pytest.fixture
def mounts(tmp_path):
    """Mount points whose mounts are taken away afterwards, dead or alive."""
    points = {kind: tmp_path / f"mnt-{kind}" for kind in LAYERS}
    for point in points.values():
        point.mkdir()
    yield points
    for point in points.values():
        while mount.is_mount_point(point):
            mount.unmount(point, flags=mount.UmountFlag.DETACH)


def starter_arguments(rig: Rig) -> tuple[object, ...]:
    table = rig.table
    return (POOL, table.metadata_device, table.data_device, table.data_size, table.block_size)


class PoolLoad:
    """Creates thin devices and snapshots, each committed, until the engine is gone."""

    def __init__(self, pool: EmbeddedPoolClient, next_id: int) -> None:
        self._pool = pool
        self.next_id = next_id
        self.committed: set[int] = set()
        self.transaction_id = int(pool.status().transaction_id)
        self.attempted = self.transaction_id
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                new = ThinId(self.next_id)
                self.next_id += 1
                if new % 2:
                    self._pool.create_thin(new)
                else:
                    self._pool.create_snap(new, LAYERS["ext4"])
                self.attempted = self.transaction_id + 1
                self._pool.set_transaction_id(
                    TransactionId(self.transaction_id), TransactionId(self.attempted)
                )
                self.transaction_id = self.attempted
                self.committed.add(int(new))
                # Each costs a metadata block or more: a hundred rounds would fill the pool
                while len(self.committed) > _KEPT:
                    oldest = min(self.committed)
                    self.committed.remove(oldest)
                    self._pool.delete(ThinId(oldest))
                time.sleep(0.01)
        except (EngineError, OSError):
            pass


def run_until_killed(
    rig: Rig, pool: EmbeddedPoolClient, mounts: dict[str, Path], first: int, after: float
) -> tuple[dict[str, set[int]], PoolLoad]:
    """Load the pool, kill its engine; returns acknowledged markers per layer and the pool's."""
    markers: dict[str, set[int]] = {}
    with ExitStack() as stack:
        children = {
            kind: stack.enter_context(programs.program(WRITER, point, first))
            for kind, point in mounts.items()
        }
        load = stack.enter_context(PoolLoad(pool, first))
        time.sleep(after)
        rig.kill()
        for kind, child in children.items():
            output, stderr = child.communicate(timeout=60)
            assert stderr == ""
            markers[kind] = set()
            for line in output.splitlines():
                if line.startswith("unlinking"):
                    gone = int(line.split()[1])
                    markers[kind] -= set(range(gone, gone + 10))
                else:
                    markers[kind].add(int(line))
    return markers, load


def make_layers(pool: EmbeddedPoolClient) -> None:
    for kind, thin_id in LAYERS.items():
        pool.create_thin(thin_id)
        process.run([f"mkfs.{kind}", "-q", str(pool.activate(kind, thin_id, SIZE))])


def test_what_was_acknowledged_survives(rig, mounts):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    pool = rig.activate()
    make_layers(pool)
    markers: dict[str, set[int]] = {kind: set() for kind in LAYERS}
    next_id = 1000
    for _ in range(KILLS):
        for kind, thin_id in LAYERS.items():
            node = pool.activate(kind, thin_id, SIZE)
            mount.mount(node, mounts[kind], kind)
            for number in markers[kind]:
                path = mounts[kind] / str(number)
                assert path.read_bytes() == b"%d\n" % number * 2000, path
            markers[kind] = set()
            for path in mounts[kind].iterdir():
                if path.name.isdigit():
                    path.unlink()
        markers, load = run_until_killed(rig, pool, mounts, next_id, chance.uniform(0.1, 0.8))
        next_id = max(load.next_id, *(max(found, default=0) for found in markers.values())) + 1000
        rig.check()
        pool = rig.activate()
        assert not any(mount.is_mount_point(point) for point in mounts.values())
        assert load.committed <= set(pool.thin_ids())
        assert load.transaction_id <= pool.status().transaction_id <= load.attempted
        assert pool.devices() == []
        for thin_id in set(pool.thin_ids()) - set(LAYERS.values()):
            pool.delete(thin_id)
    for kind, thin_id in LAYERS.items():
        node = pool.activate(kind, thin_id, SIZE)
        mount.mount(node, mounts[kind], kind)
        for number in markers[kind]:
            assert (mounts[kind] / str(number)).read_bytes() == b"%d\n" % number * 2000
        mount.unmount(mounts[kind])
        check = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}[kind]
        process.run([*check, str(node)])


def test_killed_while_devices_come_and_go(rig):
    chance = random.Random(11)
    pool = rig.activate()
    pool.create_thin(ThinId(1))
    pool.commit()
    for round_number in range(KILLS):
        with ExitStack() as stack:
            children = [
                stack.enter_context(programs.program(COMER_AND_GOER, POOL, number, int(SIZE)))
                for number in range(1000 + 10 * round_number, 1003 + 10 * round_number)
            ]
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline() == "go\n"
            time.sleep(chance.uniform(0.0, 0.3))
            rig.kill()
            for child in children:
                output, stderr = child.communicate(timeout=60)
                assert stderr == ""
                assert output.count("\n") == 1
        rig.check()
        pool = rig.activate()
        assert pool.devices() == []
        assert engine_leftovers.loop_devices(rig.paths) == []
        assert pool.thin_ids()[0] == 1


def test_killed_without_load(rig, mounts):
    pool = rig.activate()
    make_layers(pool)
    pool.commit()
    rig.kill()
    assert rig.engine.find_pool(POOL) is None
    with pytest.raises(EngineError):
        pool.status()
    assert rig.activate().thin_ids() == sorted(LAYERS.values())


def test_deactivation_clears_what_a_killed_engine_left(rig, mounts, runtime_base):
    pool = rig.activate()
    make_layers(pool)
    mount.mount(pool.activate("ext4", LAYERS["ext4"], SIZE), mounts["ext4"], "ext4")
    rig.kill()
    assert len(remaining(runtime_base)) >= 3
    assert rig.engine.deactivate_pool(POOL) is Outcome.ALREADY
    assert remaining(runtime_base) == []
    assert not mount.is_mount_point(mounts["ext4"])


def test_killed_while_a_program_keeps_a_file_open(rig, mounts):
    pool = rig.activate()
    make_layers(pool)
    node = pool.activate("ext4", LAYERS["ext4"], SIZE)
    mount.mount(node, mounts["ext4"], "ext4")
    (mounts["ext4"] / "file").write_text("x")
    os.sync()
    with open(mounts["ext4"] / "file"):
        rig.kill()
        pool = rig.activate()
        again = pool.activate("ext4", LAYERS["ext4"], SIZE)
        assert again != node
        mount.mount(again, mounts["ext4"], "ext4")
        assert (mounts["ext4"] / "file").read_text() == "x"
        mount.unmount(mounts["ext4"])
    wait_for(lambda: loop.find_status(node) is None)


def test_killed_while_a_client_has_suspended(rig, mounts):
    pool = rig.activate()
    make_layers(pool)
    mount.mount(pool.activate("ext4", LAYERS["ext4"], SIZE), mounts["ext4"], "ext4")
    with pytest.raises(EngineError), pool.suspended("ext4"):
        rig.kill()
    # Thawed: whoever writes gets an error instead of waiting for ever
    with programs.program(TOUCHER, mounts["ext4"] / "new") as child:
        _, stderr = child.communicate(timeout=30)
        assert "OSError" in stderr
    assert rig.activate().devices() == []


def test_a_client_that_dies_while_it_has_suspended(rig, mounts):
    pool = rig.activate()
    make_layers(pool)
    mount.mount(pool.activate("ext4", LAYERS["ext4"], SIZE), mounts["ext4"], "ext4")
    with programs.program(SUSPENDER, POOL, "ext4") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "suspended\n"
        info = pool.info("ext4")
        assert info is not None
        assert info.state is Activation.SUSPENDED
        child.send_signal(signal.SIGKILL)
    with programs.program(TOUCHER, mounts["ext4"] / "new") as child:
        assert child.communicate(timeout=30) == ("done\n", "")
    info = pool.info("ext4")
    assert info is not None
    assert info.state is Activation.ACTIVE
    with pool.suspended("ext4"):
        pass
    mount.unmount(mounts["ext4"])


def test_a_starter_that_dies_while_it_starts(rig):
    chance = random.Random(4)
    for _ in range(4):
        with programs.program(STARTER, *starter_arguments(rig)) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "go\n"
            time.sleep(chance.uniform(0.0, 0.5))
            child.send_signal(signal.SIGKILL)
        assert rig.activate().status().transaction_id == 0
        assert rig.server().alive()
        rig.deactivate()


def test_starters_at_once_share_one_engine(rig):
    with ExitStack() as stack:
        children = [
            stack.enter_context(programs.program(STARTER, *starter_arguments(rig)))
            for _ in range(4)
        ]
        for child in children:
            assert child.communicate(timeout=120) == ("go\nstarted\n", "")
    log = rig.paths.log.read_text()
    assert log.count("serving pool") == 1


def test_commands_that_activate_at_once_share_one_device(rig):
    pool = rig.activate()
    pool.create_thin(ThinId(7))
    with ExitStack() as stack:
        children = [
            stack.enter_context(programs.program(ACTIVATOR, POOL, int(SIZE))) for _ in range(4)
        ]
        answers = set()
        for child in children:
            output, stderr = child.communicate(timeout=60)
            assert stderr == ""
            assert output.count("\n") == 20
            answers |= set(output.split())
    assert len(answers) == 1
    assert len(engine_leftovers.loop_devices(rig.paths)) == 1


def test_a_pid_that_somebody_else_has_now(rig):
    rig.activate()
    rig.kill()
    rig.paths.pid.write_text(f"{os.getpid()} 1\n")
    assert rig.activate().thin_ids() == []


def test_a_pool_that_cannot_be_opened_says_why(rig, runtime_base):
    rig.table.metadata_device.write_bytes(os.urandom(1 << 20))
    with pytest.raises(IntegrityError):
        rig.activate()
    assert rig.engine.find_pool(POOL) is None
    assert remaining(runtime_base) == []
    with open(rig.table.metadata_device, "r+b") as file:
        file.truncate(0)
        file.truncate(16 << 20)


def test_one_pool_is_not_opened_under_two_names(rig, runtime_base):
    rig.activate()
    with pytest.raises(PoolBusy, match=str(rig.server().pid)):
        rig.engine.activate_pool("other", rig.table)
    assert rig.engine.find_pool("other") is None
    assert not (runtime_base / "other").exists()
    assert rig.activate().thin_ids() == []


def test_missing_devices_say_so(rig):
    missing = rig.table._replace(data_device=Path("/nonexistent/data"))
    with pytest.raises((DevmapperError, OSError), match="/nonexistent/data"):
        rig.engine.activate_pool(POOL, missing)


def test_a_command_that_died_between_export_and_loop_device(rig, monkeypatch):
    pool = rig.activate()
    pool.create_thin(ThinId(7))
    pool._order("activate", name="half", thin_id=7, size=int(SIZE))
    assert pool.info("half") is None
    with pytest.raises(DevmapperError):
        pool.delete(ThinId(7))
    node = pool.activate("half", ThinId(7), SIZE)
    info = pool.info("half")
    assert info is not None
    assert info.path == node
    assert engine_leftovers.loop_devices(rig.paths) == [node]
    # And the other way: the loop device is detached, the export still there
    loop.detach(node)
    assert pool.deactivate("half") is Outcome.DONE
    pool.delete(ThinId(7))
    with pytest.raises(ThinIdMissing):
        pool.thin_status(ThinId(7))
    assert runtime.read_pid(rig.paths) == rig.server()


def test_an_open_graph_survives_its_engine(tmp_path):
    """What a daemon sees: the next call of any kind finds an engine, and layers as they were."""
    home = tmp_path / "graph"
    with devmapper.init(home, GRAPH, engine=EmbeddedEngine()) as driver:
        driver.create("a")
        root = Path(driver.get("a", user="docker"))
        (root / "file").write_text("durable")
        os.sync()
        calls: list[Callable[[], object]] = [
            lambda: driver.create("b", "a"),
            lambda: driver.get("a", user="docker"),
            lambda: driver.remove("b"),
            lambda: driver.put("a", user="docker"),
        ]
        for call in calls:
            identity = runtime.read_pid(runtime.paths_of(driver.devices.pool.name))
            assert identity is not None
            os.kill(identity.pid, signal.SIGKILL)
            assert identity.wait(60)
            with suppress(LayerNotMounted):  # mounts went with the engine
                call()
        assert driver.layers() == ["a"]
        assert (Path(driver.get("a")) / "file").read_text() == "durable"
        driver.cleanup()
    assert thin_tools.thin_check(home / "devicemapper" / "metadata")
