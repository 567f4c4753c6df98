"""A daemon that is killed again and again, under clients that know what it has promised them.

Each client is a thread with its own random numbers, its own names and a model of what was
acknowledged.  What was under way at a kill is uncertain and resolved as dockerd and containerd do
it: by asking again.  Everything else that fails, fails the run.
"""

import os
import random
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from tests.support.daemon import Daemon

T = TypeVar("T")

UP_SECONDS: Final = 90.0
_LIVES: Final = (2.0, 5.0)  # seconds that a daemon is given
_DEAD: Final = (0.0, 0.3)  # and for which there is none

SHARED: Final = "shared"  # the name of a layer, and of a snapshot

Files = dict[str, bytes]


class Stopped(Exception):
    """Another client has failed: this one has nothing to add."""


class Refused(Exception):
    """The daemon has answered with an error; *code* is the protocol's own."""

    def __init__(self, code: object, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Lost(Exception):
    """There was no answer."""


class Rig:
    """What the clients share: the daemon's lives, and the end."""

    def __init__(self, daemon: Daemon, folder: Path, seed: int) -> None:
        self.daemon = daemon
        self.folder = folder
        self.random = random.Random(seed)
        self.shared = {
            SHARED: {"shared": self.random.randbytes(5000)}
        }  # all use it, none removes it
        self.kills = 0
        self.failures: list[str] = []
        self.operations: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {}  # of each operation
        self.waits: list[float] = []  # until a new daemon was ready
        self._changed = threading.Condition()
        self._up = True
        self._over = False

    @property
    def over(self) -> bool:
        return self._over or bool(self.failures)

    def life(self) -> int:
        """Wait until the daemon is there; which of its lives it is."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._up or self.failures, UP_SECONDS):
                raise AssertionError("the daemon does not come back")
            if self.failures:
                raise Stopped
            return self.kills

    def kill(self) -> None:
        """SIGKILL, and a new daemon."""
        with self._changed:
            self.kills += 1
            self._up = False
        self.daemon.kill()
        time.sleep(self.random.uniform(*_DEAD))
        begin = time.monotonic()
        self.daemon.start()
        self.waits.append(time.monotonic() - begin)
        with self._changed:
            self._up = True
            self._changed.notify_all()

    def count(self, operation: str, seconds: float) -> None:
        with self._changed:
            self.operations[operation] += 1
            self.seconds.setdefault(operation, []).append(seconds)

    def fail(self, text: str) -> None:
        with self._changed:
            self.failures.append(text)
            self._changed.notify_all()

    def run(self, clients: "Collection[Client]", seconds: float) -> None:
        """Let the clients work for so long, killing the daemon meanwhile; then all settle."""
        end = time.monotonic() + seconds
        with self.at_once([client.work for client in clients]):
            try:
                while not self.over and (left := end - time.monotonic()) > 0:
                    time.sleep(min(left, self.random.uniform(*_LIVES)))
                    self.kill()
            except BaseException:
                self.fail(traceback.format_exc())
                raise
            finally:
                self._over = True

    @contextmanager
    def at_once(self, calls: Iterable[Callable[[], None]]) -> Iterator[None]:
        """Calls that do not raise, each in a thread; the first failure of any client is raised."""
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.join()
        assert not self.failures, "\n\n".join(self.failures)


class Client:
    """One client.  A subclass says what a step is, and how to look at all that it has."""

    def __init__(self, rig: Rig, name: str, seed: int) -> None:
        self.rig = rig
        self.name = name
        self.random = random.Random(seed)
        self._number = 0
        self._life = 0
        self._last: deque[str] = deque(maxlen=25)

    def step(self) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        """Compare all that there is with the model."""
        raise NotImplementedError

    def remove_all(self) -> None:
        raise NotImplementedError

    def reconnect(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def work(self) -> None:
        """Go on until the end of the run."""
        self._guarded(self._work)

    def end(self) -> None:
        """Remove everything."""
        self._guarded(self.remove_all)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException:
            last = "\n  ".join(self._last)
            self.rig.fail(f"client {self.name}:\n{traceback.format_exc()}\nits last:\n  {last}")

    def _work(self) -> None:
        while not self.rig.over:
            self.step()
        self.settle()

    def ask(
        self,
        operation: str,
        call: Callable[[], T],
        *,
        done: Callable[[Refused], bool] = lambda _: False,
        again: Callable[[], object] | None = None,
    ) -> T | None:
        """Make a request, again and again over the daemon's deaths.

        *again* is called before it is repeated.  None if a repeated one is refused because the
        first has been *done*.
        """
        lost = False
        while True:
            life = self.rig.life()
            if life != self._life:  # a connection that was idle at a kill has ended as well
                self.reconnect()
                self._life = life
            begin = time.monotonic()
            try:
                if lost and again is not None:
                    again()
                found = call()
            except Lost as err:
                self._last.append(f"life {life}: {operation}: lost: {err}")
                if self.rig.kills == life:
                    raise AssertionError(f"{operation} was lost while the daemon lived") from err
                lost = True
                continue
            except Refused as err:
                self._last.append(f"life {life}: {operation}: {err}")
                if lost and done(err):
                    return None
                raise
            self._last.append(f"life {life}: {operation}")
            self.rig.count(operation.split(maxsplit=1)[0], time.monotonic() - begin)
            return found

    def new_name(self) -> str:
        self._number += 1
        return f"{self.name}-{self._number}"

    def new_files(self) -> Files:
        """Some files that no layer has yet; every other one in a directory."""
        found = {}
        for _ in range(self.random.randint(1, 3)):
            name = self.new_name()
            length = self.random.choice((0, 11, 5000, 70_000))
            found[self.random.choice((name, f"d/{name}"))] = self.random.randbytes(length)
        return found


def write_files(top: Path, files: Mapping[str, bytes]) -> None:
    """Write them durably."""
    for name, data in files.items():
        path = top / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    for directory in {top, *((top / name).parent for name in files)}:
        sync_directory(directory)


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_files(top: Path) -> Files:
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


def check_files(top: Path, wanted: Mapping[str, bytes], what: str) -> None:
    found = read_files(top)
    missing, strange = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    assert not missing, f"{what}: lost: {sorted(missing)}"
    assert not strange, f"{what}: not ours: {sorted(strange)}"
    wrong = [name for name, data in wanted.items() if found[name] != data]
    assert not wrong, f"{what}: other content: {wrong}"
