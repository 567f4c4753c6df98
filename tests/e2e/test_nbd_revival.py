"""Disks over NBD whose engine is killed: the daemon starts another, and who only reads goes on."""

import os
import re
import select
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devmapper.engine.embedded import runtime
from devmapper.engine.runtime import runtime_base
from devmapper.units import KIB
from tests.support import leftovers
from tests.support.daemon import Daemon, served
from tests.support.nbd_client import NbdClient
from tests.support.unix_http import docker_call
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

SLOT = 64 * KIB
SECONDS = 120.0
OPTIONS: dict[str, Any] = {"engine": "embedded", "check_log": False, "watch_interval": "100ms"}


class QemuIo:
    """QEMU's block layer with a disk that it connects to again if it has to."""

    def __init__(self, disk: Path, *, read_only: bool = False) -> None:
        delay = f",reconnect-delay={SECONDS:.0f}" if read_only else ""
        where = f"driver=nbd,server.type=unix,server.path={disk}{delay}"
        options = ["--read-only"] if read_only else []
        self._process = subprocess.Popen(
            ["qemu-io", *options, "--image-opts", where],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            self.run()
        except BaseException:
            self.close()
            raise

    def run(self, command: str = "", *, fails: bool = False) -> None:
        """Give it a command and wait until it asks for the next one; nothing has failed, or it has.

        It reads ahead, and does not look again at what it has read: one line at a time.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if command:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        said = b""
        deadline = time.monotonic() + SECONDS
        while not said.endswith(b"qemu-io> "):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            assert ready, (command, said)
            data = os.read(self._process.stdout.fileno(), 65536)
            assert data, (command, said)
            said += data
        assert bool(re.search(rb"fail|error", said, re.IGNORECASE)) == fails, (command, said)

    def write(self, slot: int, value: int) -> None:
        self.run(f"write -P {value} {slot * SLOT} {SLOT}")

    def check(self, slot: int, value: int) -> None:
        self.run(f"read -P {value} {slot * SLOT} {SLOT}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def qemu_io(disk: Path, *, read_only: bool = False) -> Iterator[QemuIo]:
    opened = QemuIo(disk, read_only=read_only)
    try:
        yield opened
    finally:
        opened.close()


def kill_engine() -> None:
    (pool,) = [each for each in leftovers.pools_of(runtime_base()) if each.pid.exists()]
    identity = runtime.read_pid(pool)
    assert identity is not None
    os.kill(identity.pid, signal.SIGKILL)
    assert identity.wait(SECONDS)


def await_again(daemon: Daemon, layer: str, times: int) -> None:
    told = f"layer '{layer}' is served over NBD again"
    wait_for(lambda: daemon.log.read_text().count(told) >= times, daemon.log.read_text)


@pytest.mark.qemu
def test_who_reads_goes_on_and_who_writes_is_told(tmp_path):
    """A machine that writes must not come back to a disk that has lost what it wrote last."""
    with served(tmp_path, **OPTIONS) as daemon:
        dm = daemon.command
        disk, base = daemon.sockets / "vm.sock", daemon.sockets / "base.sock"
        dm("create", "base-disk")
        dm("nbd", "base-disk", "--socket", disk)
        with qemu_io(disk) as machine:
            machine.write(0, 77)
            machine.run("flush")
        dm("nbd", "base-disk", "--stop")
        dm("create", "vm", "--parent", "base-disk")
        dm("nbd", "base-disk", "--socket", base, "--read-only")
        durable: dict[int, int] = {}
        with qemu_io(base, read_only=True) as reader:
            for number in range(2):
                dm("nbd", "vm", "--socket", disk)
                with qemu_io(disk) as machine:
                    for slot, value in durable.items():
                        machine.check(slot, value)
                    for slot in range(8):
                        value = 16 * number + slot + 1
                        machine.write(100 * number + slot, value)
                        durable[100 * number + slot] = value
                    machine.run("flush")
                    for slot in range(8, 12):
                        machine.run(f"aio_write -P 99 {(100 * number + slot) * SLOT} {SLOT}")
                    kill_engine()  # while these are under way, or lie in its memory
                    await_again(daemon, "base-disk", number + 1)
                    machine.run("flush", fails=True)
                assert "layer 'vm' is not served over NBD any more" in daemon.log.read_text()
                reader.check(0, 77)
        dm("nbd", "base-disk", "--stop")
        assert dm("check").status == 0


def test_each_service_comes_back_as_it_was(tmp_path):
    with served(tmp_path, **OPTIONS) as daemon:
        dm = daemon.command
        own, gone = daemon.sockets / "own.sock", daemon.sockets / "gone.sock"
        for layer in ("own", "chosen", "gone", "ended"):
            dm("create", layer)
        dm("nbd", "own", "--socket", own, "--read-only")
        os.chown(own, 1234, 4321)
        chosen = Path(dm("nbd", "chosen", "--read-only").text.strip().partition("=")[2])
        dm("nbd", "gone", "--socket", gone, "--read-only")
        dm("nbd", "ended", "--read-only")
        dm("nbd", "ended", "--stop")
        daemon.restart()  # the next one has to learn what is served
        gone.unlink()
        gone.write_text("somebody's")
        kill_engine()
        await_again(daemon, "own", 1)
        await_again(daemon, "chosen", 1)
        found = own.stat()
        assert (found.st_uid, found.st_gid) == (1234, 4321)
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert stat.S_IMODE(chosen.stat().st_mode) == 0o600
        with NbdClient.ready(str(own)), NbdClient.ready(str(chosen)):
            pass
        devices = dm("--json", "engine", "status").json["devices"]
        assert sorted((each["nbd"]["uri"], each["nbd"]["read_only"]) for each in devices) == sorted(
            (f"nbd+unix:///?socket={path}", True) for path in (own, chosen)
        )
        assert gone.read_text() == "somebody's"
        for layer in ("own", "chosen"):
            dm("nbd", layer, "--stop")
        kill_engine()
        dm("create", "after")
        assert daemon.log.read_text().count("is served over NBD again") == 2
        assert not own.exists()


def test_mounts_that_went_with_the_engine_are_named(tmp_path):
    with served(tmp_path, docker=True, **OPTIONS) as daemon:
        for layer in ("one", "two"):
            assert docker_call(daemon.docker, "GraphDriver.Create", ID=layer) == {}
        root = Path(docker_call(daemon.docker, "GraphDriver.Get", ID="one")["Dir"])
        (root / "file").write_text("written")
        os.sync()
        kill_engine()
        told = "layer 'one' was mounted for docker and is not any more"
        wait_for(lambda: told in daemon.log.read_text(), daemon.log.read_text)
        assert "layer 'two' was mounted" not in daemon.log.read_text()
        assert not root.exists()
        listed = {each["id"]: each for each in daemon.command("--json", "ls").json}
        assert not listed["one"]["mounted"]
        assert docker_call(daemon.docker, "GraphDriver.Put", ID="one") == {}
        assert docker_call(daemon.docker, "GraphDriver.Get", ID="one")["Dir"] == str(root)
        assert (root / "file").read_text() == "written"
        assert docker_call(daemon.docker, "GraphDriver.Put", ID="one") == {}
