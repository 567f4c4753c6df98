"""One guest: started, listened to, and ended with everything that belongs to it.

A guest is some dozens of processes of the host.  They live in a process id namespace of their own,
whose first process dies with ours: so the host's kernel ends all of them, however we end.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from tests.uml.boot import Machine, Terminal, prepare

_CONSOLE_TAIL: Final = 60  # lines
_ENDING: Final = 20.0  # seconds that the processes of an ended guest may take to be gone
_PREFIX: Final = "dm-uml-"  # of folders; the starter's process id follows
_PIECE: Final = 64 * 1024
_SHARED_MEMORY: Final = Path("/dev/shm")
_PLACE: Final = Path("/var/tmp")  # no folder of its own is mounted over it in the guest


class LostKernel(Exception):
    """A guest that ended, or had to be ended, without telling its command's exit status."""

    def __init__(self, what: str, console: str) -> None:
        super().__init__(f"{what}\nthe end of its console:\n{console}")
        self.console = console


class GuestTimedOut(LostKernel):
    """A guest that was ended because it took too long."""


class Guest:
    """A running guest; made by `running`."""

    def __init__(self, lines: Callable[[str | None], None]) -> None:
        self._lines = lines
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._keyboard: int | None = None
        self._console: deque[str] = deque(maxlen=_CONSOLE_TAIL)
        self._status: int | None = None

    @property
    def pid(self) -> int:
        """The process of the host with whose end the guest ends."""
        assert self._process is not None
        return self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command's exit status: 128 + N if signal N ended it.

        `LostKernel` when the guest ends without one, `GuestTimedOut` when *timeout* seconds are
        over; nothing of it runs when this returns or raises.
        """
        assert self._process is not None
        try:
            ended = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise GuestTimedOut(f"took longer than {timeout} seconds", self.console()) from None
        self._join()
        if self._status is None:
            raise LostKernel(
                f"the guest told no exit status; its kernel's process ended with {ended}",
                self.console(),
            )
        return self._status

    def interrupt(self) -> None:
        """Have it end, from any thread; `wait` then finds it lost."""
        assert self._process is not None
        self._process.kill()

    def kill(self) -> None:
        """End it now; nothing of it runs when this returns."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._keyboard is not None:
            os.close(self._keyboard)
            self._keyboard = None
        self._join()

    def console(self) -> str:
        """The last lines of its kernel's console."""
        return "\n".join(self._console)

    def start(self, words: Sequence[str], fds: Sequence[int], temporary: Path) -> None:
        """Start the kernel; it lives no longer than the thread that calls this."""
        self._process = subprocess.Popen(
            # The shell is process 1 of the namespace: killed when unshare is, and all with it.  The
            # kernel can't be process 1, which is immune to the abort() that ends it in a panic
            [
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *("unshare", "--pid", "--fork", "--kill-child=KILL", "--"),
                *("sh", "-c", '"$@"; exit $?', "sh", *words),
            ],
            stdin=subprocess.DEVNULL,
            stdout=fds[0],
            stderr=fds[0],
            cwd="/",
            pass_fds=fds,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(temporary)},
            start_new_session=True,
        )

    def listen(self, take: Callable[[int], None]) -> int:
        """Read a new pipe in a thread; returns the end to write to, which the caller closes."""
        ours, theirs = os.pipe()

        def read() -> None:
            try:
                take(ours)
            finally:
                os.close(ours)

        thread = threading.Thread(target=read, name="guest", daemon=True)
        thread.start()
        self._threads.append(thread)
        return theirs

    def keyboard(self) -> int:
        """A pipe from `type` to the command's terminal; the caller closes the end returned."""
        theirs, self._keyboard = os.pipe()
        return theirs

    def type(self, keys: bytes) -> None:
        """Type on the command's terminal; without effect when the guest has ended."""
        assert self._keyboard is not None
        with suppress(BrokenPipeError):
            os.write(self._keyboard, keys)

    def take_console(self, fd: int) -> None:
        """Keep the end of the console."""
        with open(fd, "rb", closefd=False) as pipe:
            for line in pipe:
                self._console.append(line.decode(errors="replace").rstrip())

    def take_control(self, fd: int) -> None:
        """Note the exit status, hand on the other lines."""
        with open(fd, "rb", closefd=False) as pipe:
            for raw in pipe:
                line = raw.decode(errors="replace").rstrip("\r\n")
                word, _, rest = line.partition(" ")
                if word == "status" and rest.isdigit():
                    self._status = int(rest)
                else:
                    self._lines(line)
        self._lines(None)

    def _join(self) -> None:
        # Each process of the guest holds the pipes' other ends: their end is the last one's end
        for thread in self._threads:
            thread.join(_ENDING)
            if thread.is_alive():
                raise LostKernel("processes of the guest outlive it", self.console())


@contextmanager
def running(
    argv: Sequence[str],
    machine: Machine,
    *,
    output: Callable[[bytes], None],
    lines: Callable[[str | None], None] = lambda _: None,
    terminal: Terminal | None = None,
) -> Iterator[Guest]:
    """A guest that runs *argv*; it is ended with the block.

    *output* takes what the command prints as it comes; *lines* takes each line that is written to
    /dev/ttyS1 there, and None when no more will come.  Both are called in threads of ours.  With
    *terminal* the command has one, and gets what `Guest.type` is given.  The guest lives no longer
    than the thread that enters this.
    """
    sweep()
    guest = Guest(lines)
    with _folder(_PLACE) as run, _folder(_SHARED_MEMORY) as memory, ExitStack() as fds:

        def listen(take: Callable[[int], None]) -> int:
            fd = guest.listen(take)
            fds.callback(os.close, fd)
            return fd

        words = prepare(run, machine, argv, terminal)
        console, control = listen(guest.take_console), listen(guest.take_control)
        printed = listen(lambda fd: _forward(fd, output))
        typed = "null"
        passed = [console, control, printed]
        if terminal:
            passed.append(guest.keyboard())
            fds.callback(os.close, passed[-1])
            typed = f"fd:{passed[-1]}"
        at = words.index("--")
        words[at:at] = [
            "con=null", "ssl=null",
            f"con0=null,fd:{console}", f"ssl0={typed},fd:{printed}", f"ssl1=null,fd:{control}",
        ]  # fmt: skip
        try:
            guest.start(words, passed, memory)
            fds.close()
            yield guest
        finally:
            guest.kill()


def run_in_uml(
    argv: Sequence[str],
    machine: Machine | None = None,
    *,
    timeout: float | None = None,
    output: Callable[[bytes], None] | None = None,
) -> int:
    """Run a command in a guest of its own and return its exit status, as `Guest.wait` does.

    What it prints goes to *output*, or to our standard output.
    """
    with running(argv, machine or Machine(), output=output or _print) as guest:
        return guest.wait(timeout)


def _print(piece: bytes) -> None:
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _forward(fd: int, take: Callable[[bytes], None]) -> None:
    while piece := os.read(fd, _PIECE):
        take(piece)


def sweep() -> None:
    """Remove the folders of guests whose starter was killed; the guests themselves died with it."""
    for parent in (_PLACE, _SHARED_MEMORY):
        for path in parent.glob(f"{_PREFIX}*"):
            starter = path.name.removeprefix(_PREFIX).partition("-")[0]
            if not Path("/proc", starter).exists():
                shutil.rmtree(path, ignore_errors=True)  # another sweep may be at it


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """A fresh folder, for the run or for the file that is the guest's memory."""
    where = parent if os.access(parent, os.W_OK) else _PLACE
    path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=where))
    try:
        yield path.resolve()
    finally:
        shutil.rmtree(path)
