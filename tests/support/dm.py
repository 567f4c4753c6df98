"""Devices of device mapper for tests: ones that fail when told to, and what is left of any."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from devmapper.engine.kernel import devices
from devmapper.engine.kernel.devices import THIN_FLAGS
from devmapper.engine.port import PoolTable
from devmapper.linux import loop
from devmapper.linux.libdm import Target
from devmapper.units import KIB, MIB, SECTOR_SIZE, Bytes, Sectors
from tests.support.waiting import wait_for

BLOCK: Final = Bytes(64 * KIB)
DATA_SIZE: Final = Bytes(64 * MIB)
METADATA_SIZE: Final = Bytes(4 * MIB)


def make_table(
    folder: Path, *, data_size: Bytes = DATA_SIZE, metadata_size: Bytes = METADATA_SIZE
) -> PoolTable:
    """The table of a pool on two new files in *folder*."""
    for name, size in (("metadata", metadata_size), ("data", data_size)):
        with open(folder / name, "wb") as file:
            file.truncate(size)
    return PoolTable(folder / "metadata", folder / "data", data_size, BLOCK)


class Replaceable:
    """A device that maps another one, until it is told to fail."""

    def __init__(self, name: str, below: Path) -> None:
        self.name = name
        self._below = below
        self._sectors = Sectors(loop.capacity(below) // SECTOR_SIZE)
        path = devices.create(name, self._target("linear", f"{below} 0"), THIN_FLAGS)
        assert path is not None
        self.path = path

    def work(self) -> None:
        self._replace("linear", f"{self._below} 0")

    def fail_writes(self) -> None:
        self._replace("flakey", f"{self._below} 0 0 3600 1 error_writes")

    def fail(self) -> None:
        self._replace("error", "")

    def _target(self, kind: str, params: str) -> Target:
        return Target(Sectors(0), self._sectors, kind, params)

    def _replace(self, kind: str, params: str) -> None:
        devices.load(self.name, self._target(kind, params))
        devices.resume(self.name, THIN_FLAGS)


@contextmanager
def replaceable(name: str, file: Path) -> Iterator[Replaceable]:
    """A device on *file* that can be made to fail."""
    with loop.attached(file, direct_io=False) as below:
        device = Replaceable(name, below)
        try:
            yield device
        finally:
            device.work()
            settle()
            devices.remove(name)


def udevadm(*arguments: str) -> None:
    # A guest's root may be a chroot, where udevadm does nothing and says that all is well
    environment = {**os.environ, "SYSTEMD_IGNORE_CHROOT": "1"}
    subprocess.run(["udevadm", *arguments], env=environment, check=True, timeout=60)


def settle() -> None:
    """Wait until udevd has handled its events, where it runs.

    Not for ever: udevd tries again for minutes what it cannot do for a loop device that has gone
    meanwhile, and nothing here waits for that.
    """
    if Path("/run/udev/control").exists():
        with suppress(subprocess.CalledProcessError):
            udevadm("settle", "--timeout=10")


def status_line(name: str) -> str:
    found = devices.status(name, flush=False)
    assert found is not None
    assert found.target is not None
    return found.target.params


def table_line(name: str) -> str:
    """As `dmsetup table` prints it."""
    found = devices.find(name)
    assert found is not None
    assert found.target is not None
    start, length, kind, params = found.target
    return f"{start} {length} {kind} {params}".strip()


def loops_on(*files: Path) -> list[Path]:
    """The loop devices that stand on *files*."""
    return [node for file in files for node in loop.find_by_backing_file(file)]


def await_no_loops_on(*files: Path) -> None:
    """Demand that the loop devices on *files* go; udev may look at one for a moment."""
    wait_for(lambda: loops_on(*files) == [])


def semaphores() -> set[str]:
    """The keys of all System V semaphores."""
    lines = Path("/proc/sysvipc/sem").read_text(encoding="ascii").splitlines()[1:]
    return {line.split()[0] for line in lines}


@contextmanager
def udevd() -> Iterator[int | None]:
    """udev runs for the duration, if it did not before; yields its process id if it is ours."""
    if Path("/run/udev/control").exists():
        yield None
        return
    daemon = subprocess.Popen(
        ["/lib/systemd/systemd-udevd"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(Path("/run/udev/control").exists)
        udevadm("control", "--ping")
        udevadm("trigger", "--subsystem-match=block")
        udevadm("settle")
        yield daemon.pid
    finally:
        daemon.send_signal(signal.SIGCONT)  # a test may have stopped it
        udevadm("control", "--exit")
        try:
            daemon.wait(30)
        except subprocess.TimeoutExpired:
            # It waits for an event that does not end; the tests that follow shall not meet it
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        with suppress(FileNotFoundError):
            os.unlink("/run/udev/control")
