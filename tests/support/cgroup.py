"""A control group of our own (version 2): whoever is started in it is found again, and ended.

A container's processes are children of a shim that has left its parents; only the group tells that
they are ours.
"""

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

MOUNT: Final = Path("/sys/fs/cgroup")


class Group:
    """One group, with groups of its own for the processes: those in the middle cannot have any."""

    def __init__(self, name: str) -> None:
        self.path = MOUNT / name

    @contextmanager
    def entered(self, leaf: str) -> Iterator[None]:
        """This process is in *leaf* for the duration, and so is what it starts meanwhile."""
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].removeprefix("0::/")
        (self.path / leaf).mkdir(exist_ok=True)
        (self.path / leaf / "cgroup.procs").write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            (MOUNT / own / "cgroup.procs").write_text(f"{os.getpid()}\n")

    def kill(self) -> None:
        """SIGKILL all that is in the group or below, at one go, and wait until it is gone."""
        (self.path / "cgroup.kill").write_text("1\n")
        self.wait_until_empty(30)

    def populated(self) -> bool:
        return "populated 1" in (self.path / "cgroup.events").read_text().splitlines()

    def wait_until_empty(self, seconds: float) -> None:
        """The kernel tells of each change of `cgroup.events`."""
        with (self.path / "cgroup.events").open("rb", buffering=0) as events:
            waiter = select.poll()
            waiter.register(events, select.POLLPRI)
            while b"populated 1" in events.read():
                if not waiter.poll(seconds * 1000):
                    message = f"{self.path} still has processes after {seconds} seconds"
                    raise TimeoutError(message)
                events.seek(0)

    def remove(self) -> None:
        """Remove the group and those below it; it has to be empty."""
        below = [Path(folder) for folder, _, _ in os.walk(self.path, topdown=False)]
        for folder in below:
            folder.rmdir()


@contextmanager
def group(name: str) -> Iterator[Group]:
    """A group for the duration; what still runs in it at the end is killed."""
    made = Group(name)
    made.path.mkdir()
    try:
        yield made
    finally:
        made.kill()
        made.remove()
