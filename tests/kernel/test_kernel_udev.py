"""With udev, without it, and with one that does not answer.

libdevmapper decides once for each process whether udev runs, so each case is a process of its own.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.support import dm, programs

pytestmark = pytest.mark.kernel

CONTROL = Path("/run/udev/control")

PROGRAM = """
import os, sys
from pathlib import Path
from devmapper.engine.kernel import devices
from devmapper.engine.kernel.engine import KernelEngine
from devmapper.engine.port import Activation, Outcome
from devmapper.errors import EngineError
from devmapper.linux import dmnode, libdm, udev_cookie
from devmapper.units import MIB, Bytes, ThinId
from tests.support import dm, programs

SIZE, ONE = Bytes(32 * MIB), ThinId(1)
folder = Path(sys.argv[1])
table = dm.make_table(folder)
engine = KernelEngine()
node = dmnode.path_of("one")
"""

ANSWERED = """
expected = sys.argv[2] == "udev"
assert libdm.udev_sync_support() is expected, "udev"
assert engine.features().udev_sync is expected
pool = engine.activate_pool("udev-pool", table)
pool.create_thin(ONE)
assert pool.activate("one", ONE, SIZE) == node
assert node.is_symlink() is expected, "udev makes links, the library makes nodes"
assert node.is_block_device()
if expected:  # moby's flags for a pool: nobody probes it
    links = Path("/dev/disk/by-id").iterdir()
    assert any(link.name == "dm-name-one" for link in links)
with pool.suspended("one"):
    pool.create_snap(ThinId(2), ONE)
assert pool.deactivate("one") is Outcome.DONE
assert not os.path.lexists(node)
assert dm.semaphores() == set()
with open(pool.activate("one", ONE, SIZE), "rb"):
    pool.deactivate("one", deferred=True)
    assert pool.info("one").state is Activation.LEAVING
    assert node.is_block_device()
engine.deactivate_pool("udev-pool")
if expected:
    dm.settle()
assert not os.path.lexists(node)
assert dm.semaphores() == set()
print("done")
"""

UNANSWERED = """
assert libdm.udev_sync_support()
udev_cookie.TIMEOUT_SECONDS = 0.5

def refused(call):
    try:
        call()
    except EngineError as err:
        assert "udev did not complete" in str(err), err
        assert err.hint
    else:
        raise AssertionError("nobody answered, and it went on")
    assert dm.semaphores() == set()

refused(lambda: engine.activate_pool("udev-pool", table))
assert devices.find_state("udev-pool") is None
dm.await_no_loops_on(table.metadata_device, table.data_device)
udev_cookie.TIMEOUT_SECONDS = 30.0
answer()
pool = engine.activate_pool("udev-pool", table)
pool.create_thin(ONE)
stop()
udev_cookie.TIMEOUT_SECONDS = 0.5
refused(lambda: pool.activate("one", ONE, SIZE))
assert devices.find_state("one") is None
answer()
udev_cookie.TIMEOUT_SECONDS = 30.0
pool.activate("one", ONE, SIZE)
stop()
udev_cookie.TIMEOUT_SECONDS = 0.5
def suspend():
    with pool.suspended("one"):
        pool.create_snap(ThinId(2), ONE)
refused(suspend)
assert not devices.find_state("one").suspended, "resumed it is"
refused(lambda: pool.deactivate("one"))
assert devices.find_state("one") is None, "removed it is"
answer()
udev_cookie.TIMEOUT_SECONDS = 30.0
assert pool.deactivate("one") is Outcome.ALREADY
engine.deactivate_pool("udev-pool")
print("done")
"""

# A real udevd that is stopped while it has nothing to do, so that it answers nobody
REAL = """
import signal
udevd = int(sys.argv[2])
def answer():
    os.kill(udevd, signal.SIGCONT)
    dm.settle()
def stop():
    dm.settle()
    os.kill(udevd, signal.SIGSTOP)
stop()
"""


def run(folder: Path, source: str, *args: str) -> None:
    with programs.program(PROGRAM + source, str(folder), *args) as child:
        output, errors = child.communicate(timeout=200)
    assert (child.returncode, output) == (0, "done\n"), errors


@pytest.mark.skipif(CONTROL.exists(), reason="udev runs here")
def test_without_udev(tmp_path):
    run(tmp_path, ANSWERED, "none")


def test_with_udev_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("DM_DISABLE_UDEV", "1")
    with dm.udevd():
        # Both make nodes then; what counts is that nobody waits for udev
        run(tmp_path, "assert not libdm.udev_sync_support(); print('done')")


def test_with_udev(tmp_path, monkeypatch):
    monkeypatch.delenv("DM_DISABLE_UDEV", raising=False)
    with dm.udevd():
        run(tmp_path, ANSWERED, "udev")


def test_with_an_udev_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.delenv("DM_DISABLE_UDEV", raising=False)
    with dm.udevd() as process:
        assert process is not None, "the guest has a udevd that is not ours to stop"
        run(tmp_path, REAL + UNANSWERED, str(process))


def test_the_suite_with_udev(tmp_path, monkeypatch):
    """The part of the conformance suite that makes and removes devices."""
    monkeypatch.delenv("DM_DISABLE_UDEV", raising=False)
    chosen = "active or deferred or suspended or parallel or idle or mounted_origin"
    with dm.udevd():
        arguments = [sys.executable, "-m", "pytest", "-q", "--basetemp", str(tmp_path / "t")]
        arguments += ["-p", "no:cacheprovider", "-k", chosen]
        status = os.spawnv(
            os.P_WAIT,
            sys.executable,
            [*arguments, str(Path(__file__).with_name("test_kernel_engine.py"))],
        )
    assert status == 0
