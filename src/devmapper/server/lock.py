"""One daemon a graph: who it is, and where our own commands find it.

The lock is on a file of the graph, so that it holds for every process that sees the graph, whatever
its mount namespace or its `/run`; the kernel lets go of it when the daemon dies.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from devmapper.deviceset.names import GraphNames
from devmapper.engine.runtime import runtime_base
from devmapper.errors import GraphLocked
from devmapper.linux.files import FileLock

LOCK_FILE: Final = "serve.lock"


@contextmanager
def only_daemon(home: Path, control: Path) -> Iterator[None]:
    """Be the daemon of the graph in *home*, which listens for our commands at *control*.

    `GraphLocked` names the daemon that is there.
    """
    lock = FileLock(home / LOCK_FILE, note=os.fspath(control))
    try:
        lock.acquire()
    except BlockingIOError as err:
        raise GraphLocked(home, lock.holder()) from err
    try:
        yield
    finally:
        lock.release()


def serving(home: Path) -> Path | None:
    """The control socket of the daemon that has the graph in *home*; None if there is none.

    It may have ended by the time that somebody connects, and one that starts listens only when it
    is ready.
    """
    socket = FileLock(home / LOCK_FILE).note()
    return Path(socket) if socket else None


def control_socket(home: Path) -> Path:
    """Where the daemon of the graph in *home*, which has to exist, listens unless told otherwise.

    Beside the directory of the graph's pool, which goes with the engine's process.
    """
    return runtime_base() / f"{GraphNames.of(home).prefix}.sock"
