"""What the daemon consists of: signals, notices to the service manager, its lock, its log."""

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from devmapper.errors import GraphLocked
from devmapper.server import logs
from devmapper.server.config import LogFormat, LogLevel
from devmapper.server.ending import EndRequests
from devmapper.server.lock import LOCK_FILE, control_socket, only_daemon, serving
from devmapper.server.notify import Notifier
from devmapper.server.operations import Operations

# sd_notify


def receiver(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(address)
    listener.settimeout(60)
    return listener


def test_notices_reach_a_socket_with_a_path(tmp_path):
    with receiver(str(tmp_path / "notify")) as listener:
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        notifier.ready("up\nREADY=0")
        assert listener.recv(4096).decode().splitlines() == [
            "READY=1", "STATUS=up READY=0", f"MAINPID={os.getpid()}",
        ]  # fmt: skip
        notifier.status("busy")
        notifier.alive()
        notifier.stopping("bye", 1.5)
        assert [listener.recv(4096) for _ in range(3)] == [
            b"STATUS=busy", b"WATCHDOG=1", b"STOPPING=1\nSTATUS=bye\nEXTEND_TIMEOUT_USEC=1500000",
        ]  # fmt: skip


def test_notices_reach_an_abstract_socket():
    name = f"devmapper-test-{os.getpid()}"
    with receiver("\0" + name) as listener:
        Notifier({"NOTIFY_SOCKET": "@" + name}).alive()
        assert listener.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1"])
def test_without_a_manager_nothing_is_sent(address, caplog):
    Notifier({"NOTIFY_SOCKET": address}).ready("up")
    Notifier({}).ready("up")
    assert caplog.records == []


def test_a_manager_that_is_gone_is_a_warning(tmp_path, caplog):
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).ready("up")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_for_the_process_that_it_names(environment, seconds):
    assert Notifier(environment).watchdog_seconds == seconds


# Signals


def test_signals_wait_to_be_asked_for():
    before = signal.getsignal(signal.SIGTERM)
    with EndRequests() as requests:
        assert requests.wait(0) is None
        os.kill(os.getpid(), signal.SIGHUP)
        assert requests.wait(0.05) is None
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert requests.wait(60) is number
        threading.Timer(0.05, requests.wake).start()
        assert requests.wait(600) is None  # more than a test may take
    assert signal.getsignal(signal.SIGTERM) == before


def test_programs_that_are_started_meanwhile_inherit_nothing():
    with EndRequests():
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    stopping = sum(1 << number - 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    assert int(masks["SigBlk"], 16) & stopping == 0
    assert int(masks["SigIgn"], 16) & stopping == 0


# The lock

_HOLD = """
import sys, time
from pathlib import Path
from devmapper.server.lock import only_daemon
with only_daemon(Path(sys.argv[1]), Path("/run/other.sock")):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_daemon_a_graph_and_others_find_it(tmp_path):
    assert serving(tmp_path) is None
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # looking takes nothing away
            assert str(serving(tmp_path)) == "/run/other.sock"
        with (
            pytest.raises(GraphLocked, match=rf"in use by process {holder.pid} \(") as raised,
            only_daemon(tmp_path, tmp_path),
        ):
            pass
        assert len(str(raised.value).splitlines()) == 1
        holder.kill()
    assert serving(tmp_path) is None
    with only_daemon(tmp_path, tmp_path / "own.sock"):
        assert serving(tmp_path) == tmp_path / "own.sock"
    assert serving(tmp_path) is None
    assert (tmp_path / LOCK_FILE).stat().st_mode & 0o777 == 0o600


def test_the_control_socket_is_made_of_the_graph(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = control_socket(tmp_path / "a"), control_socket(tmp_path / "b")
    assert first != second
    (tmp_path / "link").symlink_to("a")
    assert control_socket(tmp_path / "link") == first


# The log


@pytest.fixture
def root_logger():
    """The logging of the process as it was before."""
    root, own = logging.getLogger(), logging.getLogger("devmapper")
    before = (root.handlers[:], root.level, own.level)
    yield
    root.handlers[:], root.level, own.level = before
    logging.getLogger("devmapper").manager._clear_cache()  # type: ignore[attr-defined]


def logged(formatter: logging.Formatter, level: int, text: str) -> str:
    record = logging.LogRecord("devmapper", level, "", 0, text, (), None)
    return formatter.format(record)


def test_lines_for_the_journal_have_priorities():
    journal = logs.JournalFormatter()
    assert logged(journal, logging.WARNING, "low") == "<4>low"
    assert logged(journal, logging.ERROR, "bad\nforged") == "<3>bad\n<3>forged"
    assert logged(journal, logging.DEBUG, "") == "<7>"


def test_lines_for_people_have_a_time_and_a_level():
    text = logged(logs.TextFormatter(), logging.INFO, "up\n2026-01-01T00:00:00.000Z INFO forged")
    first, second = text.splitlines()
    assert first.endswith("Z INFO up")
    assert second.startswith("    ")


def test_the_journal_is_known_by_its_inode(tmp_path):
    with open(tmp_path / "log", "w") as stream:
        found = os.fstat(stream.fileno())
        right = f"{found.st_dev}:{found.st_ino}"
        assert logs.is_journal(stream, {"JOURNAL_STREAM": right})
        assert not logs.is_journal(stream, {"JOURNAL_STREAM": "8:1"})
        assert not logs.is_journal(stream, {})
    assert not logs.is_journal(io.StringIO(), {"JOURNAL_STREAM": right})


def test_libraries_are_heard_when_they_warn(root_logger, capsys):
    logs.start(LogLevel.INFO, LogFormat.JOURNAL)
    logging.getLogger("aiohttp").info("quiet")
    logging.getLogger("aiohttp").warning("loud")
    logging.getLogger("devmapper.x").info("own")
    assert capsys.readouterr().err == "<4>loud\n<6>own\n"


# Requests


def test_requests_under_way_are_counted():
    operations = Operations()
    assert operations.under_way == 0
    with operations.measure("docker", "Get"), operations.measure("control", "ls"):
        assert operations.under_way == 2
    with pytest.raises(KeyError), operations.measure("docker", "Get"):
        raise KeyError
    assert operations.under_way == 0


def test_to_wake_after_the_end_touches_nothing(tmp_path):
    """The pipe's number may be another file's then; a record of the graph once got the byte."""
    requests = EndRequests()
    with requests:
        requests.wake()
        assert requests.wait(60) is None
    files = [open(tmp_path / str(number), "wb") for number in range(4)]  # noqa: SIM115
    requests.wake()
    for file in files:
        file.close()
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0, 0, 0, 0]
