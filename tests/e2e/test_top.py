"""`devmapper top` as a user has it: on a terminal that is resized, in a pipe, for a program."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devmapper.server.overview import from_json
from tests.support.command import Command, commands

if TYPE_CHECKING:
    import subprocess

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

_PATIENCE = 60.0
_ALTERNATE, _ORDINARY = b"\x1b[?1049h", b"\x1b[?1049l"
_SHOW_CURSOR = b"\x1b[?25h"


@pytest.fixture
def dm(tmp_path: Path) -> Iterator[Command]:
    with commands(tmp_path / "home") as command:
        command("create", "debian")
        command("create", "web", "--parent", "debian")
        yield command


class Terminal:
    """`devmapper top` on a terminal of its own."""

    def __init__(self, fd: int, terminal: int, process: "subprocess.Popen[bytes]") -> None:
        self.fd = fd
        self.terminal = terminal
        self.process = process
        self.shown = b""

    def await_text(self, pattern: bytes) -> None:
        """Read until *pattern* matches what has come since the last call."""
        until = time.monotonic() + _PATIENCE
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < until, self.shown
            ready, _, _ = select.select([self.fd], [], [], 0.2)
            if ready:
                self.shown += os.read(self.fd, 65536)
        self.shown = self.shown[match.end() :]

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def end(self) -> int:
        """Read what is left and return how the command ended."""
        until = time.monotonic() + _PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < until, self.shown
            ready, _, _ = select.select([self.fd], [], [], 0.1)
            if ready:
                self.shown += os.read(self.fd, 65536)
        ready, _, _ = select.select([self.fd], [], [], 0)
        if ready:
            self.shown += os.read(self.fd, 65536)
        return self.process.returncode


@contextmanager
def on_terminal(dm: Command, *words: object) -> Iterator[Terminal]:
    fd, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        before = termios.tcgetattr(terminal)
        process = dm.start(
            "top", *words, stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        try:
            yield Terminal(fd, terminal, process)
            assert termios.tcgetattr(terminal) == before, "the terminal is not as it was"
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(terminal)
        os.close(fd)


def test_on_a_terminal(dm):
    with on_terminal(dm, "--interval", "0.5") as terminal:
        terminal.await_text(re.escape(_ALTERNATE))
        terminal.await_text(b"devmapper ")
        terminal.await_text(b"mode rw")
        terminal.await_text(b"OWNER")
        terminal.await_text(b"web")
        dm("create", "later")  # another command meanwhile
        dm("get", "later")
        terminal.await_text(b"mounted")
        terminal.resize(50, 12)
        terminal.await_text(rb"LAYER(?:(?!OWNER)[^\r])*STATE")  # less of it fits
        os.write(terminal.fd, b"xyz")  # other keys do nothing
        terminal.await_text(b"debian")
        os.write(terminal.fd, b"q")
        assert terminal.end() == 0
        assert _ORDINARY in terminal.shown
        assert _SHOW_CURSOR in terminal.shown
    dm("put", "later")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_leave_the_terminal_as_it_was(dm, number, status):
    with on_terminal(dm, "--interval", "60") as terminal:
        terminal.await_text(b"web")
        if number == signal.SIGINT:
            os.write(terminal.fd, b"\x03")
        else:
            terminal.process.send_signal(number)
        assert terminal.end() == status
        assert _ORDINARY in terminal.shown


def test_one_frame_on_a_terminal(dm):
    with on_terminal(dm, "--once") as terminal:
        assert terminal.end() == 0
        assert b"web" in terminal.shown
        assert _ALTERNATE not in terminal.shown


def test_in_a_pipe(dm):
    lines = dm("top").text.splitlines()
    assert lines[0].startswith("devmapper ")
    assert any(line.startswith("web ") for line in lines)
    assert "\x1b" not in "".join(lines)


def test_for_a_program(dm):
    found = from_json(dm("--json", "top").json)
    assert found.pool is not None
    assert found.pool.status.mode == "rw"
    assert sorted(layer.id for layer in found.layers) == ["base", "debian", "web"]
    assert not found.served
    assert found.operations == ()


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "1e9"])
def test_intervals_that_are_not_fit(dm, interval):
    assert "interval" in dm.fails(2, "top", "--interval", interval)


def test_without_a_graph(dm, tmp_path):
    other = Command(tmp_path / "none", dm.options, engine=dm.engine)
    assert "no graph" in other.fails(20, "top", "--once")
    assert not (tmp_path / "none").exists()
