"""Who changes a device of a pool now, among processes and threads.

`<runtime>/.devices-<pool>` has two bytes for each device (`runtime_dir.byte_lock`): one for making
and removing it, one for suspending it.  The kernel lets go of a lock when its holder dies, so a
suspended device whose lock is free was left by a dead process.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from devmapper.engine.runtime_dir import SUSPENSION, byte_lock, make_private, runtime_base
from devmapper.errors import EngineError

_SUSPENSION_SECONDS: Final = 180.0


class DeviceLocks:
    """The locks of one pool's devices."""

    def __init__(self, pool: str) -> None:
        base = Path(os.path.realpath(runtime_base()))
        make_private(base)
        self._file = base / f".devices-{pool}"

    def device(self, name: str) -> AbstractContextManager[None]:
        """Nobody else makes or removes the device meanwhile."""
        return byte_lock(self._file, name)

    def suspension(self, name: str) -> AbstractContextManager[None]:
        """Nobody else has the device suspended meanwhile."""
        return byte_lock(self._file, name, part=SUSPENSION, timeout=_SUSPENSION_SECONDS)

    @contextmanager
    def suspension_if_free(self, name: str) -> Iterator[bool]:
        """`suspension` without waiting: whether it is ours."""
        lock = byte_lock(self._file, name, part=SUSPENSION, timeout=0)
        try:
            lock.__enter__()
        except EngineError:
            yield False
            return
        try:
            yield True
        finally:
            lock.__exit__(None, None, None)
