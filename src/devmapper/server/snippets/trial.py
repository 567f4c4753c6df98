"""Trying whether another side can use the daemon: what is looked at, and what to do about it."""

import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from devmapper.errors import DevmapperError
from devmapper.server import lock

Look = Callable[[], str]  # what was found; raises what is wrong


class Step(NamedTuple):
    """One thing that was tried."""

    what: str
    ok: bool
    told: str  # what was found, or what is wrong
    hint: str = ""  # what to do about it


class TrialFailed(DevmapperError):
    """What was tried does not work; nothing of it is left."""


def tried(what: str, look: Look, hint: str = "") -> Step:
    """Do one thing; an error of ours or of the system is a step that failed."""
    try:
        return Step(what, ok=True, told=look())
    except (DevmapperError, OSError) as err:
        own = err.hint if isinstance(err, DevmapperError) else ""
        notes = getattr(err, "__notes__", ())
        return Step(what, ok=False, told="; ".join([str(err), *notes]), hint=own or hint)


def until_one_fails(*steps: Callable[[], Step]) -> Iterator[Step]:
    """Each builds on those before it."""
    for step in steps:
        done = step()
        yield done
        if not done.ok:
            return


def daemon_runs(home: Path) -> Step:
    """Whether a daemon has the graph."""

    def look() -> str:
        control = lock.serving(home)
        if control is None:
            raise TrialFailed(f"no daemon has the graph {str(home)!r}")
        return f"a daemon has the graph {str(home)!r}"

    return tried("daemon", look, "start it: systemctl start devmapper, or devmapper serve")


def socket_is_there(path: Path, option: str) -> Step:
    """Whether there is a socket that nobody else can open."""

    def look() -> str:
        found = path.stat()
        if not stat.S_ISSOCK(found.st_mode):
            raise TrialFailed(f"{str(path)!r} is no socket")
        if found.st_mode & 0o077:
            raise TrialFailed(f"{str(path)!r} can be opened by others than root")
        return f"{str(path)!r} is a socket of root's"

    return tried("socket", look, f"let the daemon serve it: devmapper serve {option}")
