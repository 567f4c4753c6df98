"""The unit as it is packaged, under a systemd that is process 1."""

import http.client
import io
import json
import stat
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Command
from tests.support.systemd import (
    CONTAINERD,
    DOCKER,
    PACKAGED,
    SERVICE,
    Systemd,
    booted,
    config,
)
from tests.support.unix_http import UnixConnection
from tests.uml.boot import CHECKOUT

# docker, for containerd's own unit
pytestmark = [pytest.mark.kernel, pytest.mark.systemd, pytest.mark.docker]

EMBEDDED_TOO = pytest.mark.parametrize("engine", ["kernel", "embedded"])
EMBEDDED_IN_SOAK = pytest.mark.parametrize(
    "engine", ["kernel", pytest.param("embedded", marks=pytest.mark.soak)]
)
MIB = 1 << 20


def processes(machine: Systemd) -> set[int]:
    """The ids, there, of all processes in the unit's control group."""
    group = machine.show(SERVICE, "ControlGroup")[0]
    return {int(word) for word in machine("cat", f"/sys/fs/cgroup{group}/cgroup.procs").split()}


def is_up_again(machine: Systemd, before: int) -> bool:
    state, pid = machine.show(SERVICE, "ActiveState", "MainPID")
    return state == "active" and int(pid) != before


def ended(machine: Systemd) -> list[str]:
    return machine.show(SERVICE, "ActiveState", "Result", "ExecMainStatus")


# Ready, killed, hung


@EMBEDDED_TOO
def test_ready_when_it_serves_and_back_when_it_was_killed(tmp_path, engine):
    with booted(tmp_path / "rig", config(engine, containerd=True)) as machine:
        machine.systemctl("start", SERVICE)
        for socket in (DOCKER, CONTAINERD):
            assert stat.S_IMODE(machine.path(socket).stat().st_mode) == 0o600
        machine.docker("Create", ID="one")  # nobody had to wait for it
        status = machine.systemctl("status", SERVICE)
        assert "Status: \"serving graph '/var/lib/devmapper': control on unix:" in status
        assert machine.show(SERVICE, "WatchdogUSec") == ["1min"]
        assert machine.logged("--priority=warning") == []
        assert "created layer 'one' from 'base'" in machine.logged("--priority=info")

        directory = machine.docker("Get", ID="one")
        path = machine.path(directory)
        (path / "file").write_text("kept")
        # Not of the daemon alone: process 1 sees the mount, and has a unit for it
        mount = machine("systemd-escape", "--path", "--suffix=mount", str(Path(directory).parent))
        assert machine.show(mount.strip(), "ActiveState") == ["active"]

        daemon = machine.main_pid()
        others = processes(machine) - {daemon}
        assert len(others) == (engine == "embedded")  # the engine's process
        machine.systemctl("kill", "--kill-whom=main", "--signal=KILL", SERVICE)
        machine.until(lambda: is_up_again(machine, daemon), "up again")
        assert machine.show(SERVICE, "NRestarts") == ["1"]
        assert others < processes(machine)
        assert machine.show(mount.strip(), "ActiveState") == ["active"]
        assert (path / "file").read_text() == "kept"
        (path / "file").write_text("written")
        machine.docker("Put", ID="one")
        machine.until(lambda: not path.exists(), "unmounted")

        machine.systemctl("stop", SERVICE)
        assert machine.show(SERVICE, "ActiveState", "Result") == ["inactive", "success"]
        assert not machine.path(DOCKER).exists()
        assert machine.path("/run/devmapper").is_dir()
        machine.systemctl("start", SERVICE)
        assert (
            machine.path(machine.docker("Get", ID="one")).joinpath("file").read_text() == "written"
        )
        machine.docker("Put", ID="one")


def test_what_hangs_is_replaced_or_broken_off(tmp_path):
    with booted(tmp_path / "rig", config("kernel", stop_time="500ms")) as machine:
        machine.drop_in("[Service]\nWatchdogSec=8\nLimitCORE=0\n")
        machine.systemctl("start", SERVICE)
        daemon = machine.main_pid()
        machine.systemctl("kill", "--kill-whom=main", "--signal=STOP", SERVICE)
        machine.until(lambda: is_up_again(machine, daemon), "up again")
        assert "Watchdog timeout" in machine.journal("--unit", SERVICE)
        # It tells where it hung
        assert any(line.startswith("Current thread 0x") for line in machine.logged())

        machine.docker("Create", ID="one")
        client = begin_apply(machine, tar_of(b"x" * MIB))
        machine.systemctl("stop", SERVICE)
        client.close()
        assert ended(machine) == ["inactive", "success", "0"]
        warned = machine.logged("--priority=warning")
        assert any("requests under way were broken off" in line for line in warned)
        assert not any("told to end" in line for line in warned)


# The end


@EMBEDDED_IN_SOAK
def test_stop_waits_for_what_runs_longer_than_the_unit_allows(tmp_path, engine):
    body = tar_of(b"x" * MIB)
    with booted(tmp_path / "rig", config(engine, stop_time="1h")) as machine:
        machine.drop_in("[Service]\nTimeoutStopSec=1\n")
        machine.systemctl("start", SERVICE)
        machine.docker("Create", ID="one")
        client = begin_apply(machine, body)
        with ThreadPoolExecutor() as pool:
            stopping = pool.submit(machine.systemctl, "stop", SERVICE)
            await_status(machine, "waiting for requests under way")
            time.sleep(3)  # well beyond TimeoutStopSec
            assert not stopping.done()
            client.send(body[len(body) // 2 :])
            assert json.loads(client.getresponse().read())["Size"] == MIB
            client.close()
            stopping.result()
        assert ended(machine) == ["inactive", "success", "0"]
        assert machine.logged("--priority=warning") == []


@pytest.mark.soak
def test_stopped_while_it_starts_it_has_not_failed(tmp_path):
    with booted(tmp_path / "rig", config("kernel")) as machine:
        machine.systemctl("start", "--no-block", SERVICE)
        machine.until(lambda: machine.main_pid() != 0, "started")
        machine.systemctl("stop", SERVICE)  # before Python is ours
        assert ended(machine)[:2] == ["inactive", "success"]
        machine.systemctl("start", "--no-block", SERVICE)
        machine.until(lambda: machine.show(SERVICE, "StatusText") != [""], "opening the graph")
        machine.systemctl("stop", SERVICE)
        assert ended(machine)[:2] == ["inactive", "success"]
        assert machine.logged("--priority=err") == []
        machine.systemctl("start", SERVICE)
        machine.docker("Create", ID="one")


@EMBEDDED_IN_SOAK
def test_restarts_lose_no_request_that_was_under_way(tmp_path, engine):
    with booted(tmp_path / "rig", config(engine)) as machine:
        machine.systemctl("start", SERVICE)
        over = threading.Event()
        with ThreadPoolExecutor() as pool:
            clients = [pool.submit(churn, machine, f"client{n}", over) for n in range(4)]
            try:
                for _ in range(2):
                    time.sleep(0.5)  # some requests
                    machine.systemctl("restart", SERVICE)
            finally:
                over.set()
            assert all(client.result() for client in clients)
        assert machine.show(SERVICE, "NRestarts", "Result") == ["0", "success"]
        assert machine.logged("--priority=warning") == []


def churn(machine: Systemd, layer: str, over: threading.Event) -> int:
    """Make and remove a layer over and over; how often.

    Tried again is only what could not be sent: where the connection is refused, or closed before.
    """
    rounds = 0
    while not over.is_set():
        for call in ("Create", "Get", "Put", "Remove"):
            reply = sent(machine, f"/GraphDriver.{call}", {"ID": layer})
            assert not reply.get("Err"), (call, reply)
        rounds += 1
    return rounds


def sent(machine: Systemd, url: str, members: dict[str, str]) -> Any:
    deadline = time.monotonic() + 60
    while True:
        connection = UnixConnection(machine.path(DOCKER))
        try:
            try:
                connection.request("POST", url, json.dumps(members))
            except (ConnectionRefusedError, FileNotFoundError, BrokenPipeError):
                assert time.monotonic() < deadline
                time.sleep(0.05)
                continue
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


def tar_of(content: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        info = tarfile.TarInfo("big")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def begin_apply(machine: Systemd, body: bytes) -> http.client.HTTPConnection:
    """Send the first half of a layer's content; returns when it is under way."""
    client = UnixConnection(machine.path(DOCKER))
    client.putrequest("POST", "/GraphDriver.ApplyDiff?id=one&parent=")
    client.putheader("Content-Length", str(len(body)))
    client.endheaders()
    client.send(body[: len(body) // 2])
    mounts = machine.path("/proc/1/mountinfo")
    machine.until(lambda: "/mnt/one" in mounts.read_text(), "under way")
    return client


def await_status(machine: Systemd, text: str) -> None:
    machine.until(lambda: machine.show(SERVICE, "StatusText") == [text], text)


# What is wrong at the start


def test_a_wrong_file_is_one_sentence_and_no_second_try(tmp_path):
    with booted(tmp_path / "rig", config("steam")) as machine:
        assert machine.run("systemctl", "start", SERVICE).returncode == 1
        assert ended(machine) == ["failed", "exit-code", "2"]
        assert machine.show(SERVICE, "NRestarts") == ["0"]
        told = machine.logged("--priority=err")
        assert told == machine.logged()
        assert told[0].startswith("devmapper: config file '/etc/devmapper/config.toml'")
        assert "steam" in told[0]
        assert all(line.startswith("hint: ") for line in told[1:])
        assert len(told) <= 2
        assert list(machine.path("/var/lib/devmapper").iterdir()) == []


@pytest.mark.soak
def test_what_fails_again_and_again_is_given_up(tmp_path):
    with booted(tmp_path / "rig", config("kernel")) as machine:
        machine.drop_in("[Service]\nRestartSec=0\n")
        machine.path("/run/docker").write_text("where a folder has to be")
        assert machine.run("systemctl", "start", SERVICE).returncode == 1
        machine.until(lambda: machine.show(SERVICE, "ActiveState") == ["failed"], "given up")
        assert machine.show(SERVICE, "ExecMainStatus", "NRestarts") == ["1", "5"]
        told = machine.logged("--priority=err")
        assert len(told) == 5
        assert len(set(told)) == 1


# Before whom it starts and after whom it ends

CLIENT = """
[Unit]
Description=A client that stands for Docker

[Service]
Type=oneshot
RemainAfterExit=yes
Environment=PYTHONPATH={checkout}
ExecStart={python} {script} start
ExecStop={python} {script} stop

[Install]
WantedBy=multi-user.target
"""
SCRIPT = """
import sys
from pathlib import Path
from tests.support.unix_http import docker_call

def call(name):
    reply = docker_call(Path("{socket}"), "GraphDriver." + name, ID="one")
    assert not reply.get("Err"), reply
    return reply.get("Dir")

if sys.argv[1] == "start":
    call("Create")
    (Path(call("Get")) / "file").write_text("at start")
else:
    path = Path(call("Get"))
    seen = (path / "file").read_text()
    (path / "file").write_text("at stop")
    call("Put")
    # It stays mounted: to unmount it is systemd's work now
    Path("{told}").write_text(seen)
"""


@EMBEDDED_IN_SOAK
def test_it_starts_before_its_clients_and_ends_after_them(tmp_path, engine):
    script, told = tmp_path / "client.py", tmp_path / "told"
    script.write_text(SCRIPT.format(socket=DOCKER, told=told))
    units = {
        # What orders them is our unit alone
        "docker.service": CLIENT.format(checkout=CHECKOUT, python=sys.executable, script=script),
        "containerd.service": (PACKAGED / "containerd.service").read_text(),
    }
    with booted(
        tmp_path / "rig", config(engine), units=units, enabled=["docker.service", SERVICE]
    ) as machine:
        assert machine.show("docker.service", "ActiveState", "Result") == ["active", "success"]
        assert machine.show("multi-user.target", "ActiveState") == ["active"]
        for client in ("docker.service", "containerd.service"):
            after = machine.systemctl("list-dependencies", "--after", "--plain", client)
            assert SERVICE in after.split()
        machine.power_off()
        assert told.read_text() == "at start"
        # The layer was unmounted before the embedded engine was ended
        command = Command(tmp_path / "rig" / "graph", options=(), engine=engine)
        path = Path(command("get", "one").text.strip())
        assert (path / "file").read_text() == "at stop"
        command("put", "one")
        command.stop()
