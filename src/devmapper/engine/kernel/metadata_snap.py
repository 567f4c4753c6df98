"""Asking an active pool's metadata: the kernel has no message for it, so its blocks are read.

A metadata snap pins the trees of one commit while they are read.  There is one for a pool, so
processes of ours take turns (`PoolLocks.metadata`), and note in a file that it is theirs: one that
a killed process left is released, one of somebody else never.  Where there can be no snap of ours
the committed trees are read unpinned: a commit meanwhile may reuse their blocks, so the answer
counts only if the superblock is the same afterwards.
"""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from devmapper.engine import runtime
from devmapper.engine.kernel import devices, metadata_device
from devmapper.engine.kernel.locks import PoolLocks
from devmapper.engine.kernel.metadata_device import DirectDevice
from devmapper.engine.kernel.status import parse_pool
from devmapper.errors import EngineError, IntegrityError
from devmapper.thin.format import Superblock
from devmapper.thin.walk import open_superblock, read_superblock

log = logging.getLogger(__name__)

_MARKER: Final = "metadata-snap"
_TRIES: Final = 20
# No snap to be had: the pool takes no messages (EOPNOTSUPP: read-only), or has no block for one
_NO_SNAP: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC, errno.EBUSY})

T = TypeVar("T")
Question = Callable[[DirectDevice, Superblock], T]


def ask(pool: str, metadata: Path, locks: PoolLocks, question: Question[T]) -> T:
    """The answer to *question* about the pool's metadata as they are committed now.

    Everything done before is committed first.  *question* may be asked several times.
    """
    with locks.metadata():
        marker = locks.directory / _MARKER
        if not _reserve(pool, marker):
            return _ask_unpinned(pool, metadata, question)
        with _released(pool, marker), metadata_device.opened(metadata) as device:
            marker.write_text(str(read_superblock(device).held_root), encoding="ascii")
            return question(device, open_superblock(device, metadata_snap=True))


def release_left(pool: str) -> None:
    """Release the snap that a crash of the machine has left; the pool has just been activated."""
    if _held_root(pool) is not None:
        with suppress(OSError):  # a pool that takes no messages keeps it
            devices.message(pool, "release_metadata_snap")
            log.info("released the metadata snap that was left in pool %s", pool)


def forget(directory: Path) -> None:
    """The pool is gone, and its snap with it."""
    (directory / _MARKER).unlink(missing_ok=True)


def _reserve(pool: str, marker: Path) -> bool:
    """Take the snap; False if there is none to be had."""
    left = _marked_root(marker)
    if left is not None and left == _held_root(pool):
        devices.message(pool, "release_metadata_snap")
    _mark(marker)
    try:
        devices.message(pool, "reserve_metadata_snap")
    except OSError as err:
        marker.unlink()
        if err.errno in _NO_SNAP:
            return False
        raise
    return True


@contextmanager
def _released(pool: str, marker: Path) -> Iterator[None]:
    try:
        yield
    finally:
        devices.message(pool, "release_metadata_snap")
        marker.unlink()


def _held_root(pool: str) -> int | None:
    found = devices.status(pool, flush=False)
    if found is None or found.target is None:
        return None
    return parse_pool(found.target.params).held_metadata_root


def _marked_root(marker: Path) -> int | None:
    """The root of a snap of ours whose reader was killed."""
    try:
        return int(marker.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None  # empty: killed before the kernel's answer, so it may be another's by now


def _mark(marker: Path) -> None:
    try:
        marker.write_bytes(b"")
    except FileNotFoundError:
        runtime.make_private(marker.parent.parent)
        runtime.make_private(marker.parent)
        marker.write_bytes(b"")


def _ask_unpinned(pool: str, metadata: Path, question: Question[T]) -> T:
    error: IntegrityError | None = None
    for _ in range(_TRIES):
        devices.status(pool, flush=True)  # commits
        with metadata_device.opened(metadata) as device:
            before = read_superblock(device)
            try:
                answer = question(device, before)
            except IntegrityError as err:
                error = err
            else:
                error = None
                if read_superblock(device) == before:
                    return answer
    if error is not None:
        raise error
    raise EngineError(
        f"metadata of pool {pool!r} changed each of {_TRIES} times that they were read",
        hint="somebody else holds its metadata snap: dmsetup status shows it",
    )
