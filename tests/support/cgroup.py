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

_VERSION_1: Final = Path("/sys/fs/cgroup")


def _find_mount() -> Path | None:
    """Where version 2 is: alone, or beside the hierarchies of version 1."""
    for place in (_VERSION_1, _VERSION_1 / "unified"):
        if (place / "cgroup.controllers").exists():
            return place
    return None


MOUNT: Final = _find_mount()


def mounted() -> Path:
    assert MOUNT is not None, "no cgroup version 2 is mounted"
    return MOUNT


class Group:
    """One group, with groups of its own for the processes: those in the middle cannot have any."""

    def __init__(self, name: str) -> None:
        self.path = mounted() / name

    @contextmanager
    def entered(self, leaf: str) -> Iterator[None]:
        """This process is in *leaf* for the duration, and so is what it starts meanwhile."""
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].removeprefix("0::/")
        (self.path / leaf).mkdir(exist_ok=True)
        (self.path / leaf / "cgroup.procs").write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            (mounted() / own / "cgroup.procs").write_text(f"{os.getpid()}\n")

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
        """Remove the group and those below it; it has to be empty.

        Containers have groups of this name in the hierarchies of version 1 as well, where there are
        such.
        """
        for top in {self.path, *_VERSION_1.glob(f"*/{self.path.name}")}:
            for folder, _, _ in os.walk(top, topdown=False):
                Path(folder).rmdir()


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
