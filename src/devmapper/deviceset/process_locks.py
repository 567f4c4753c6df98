"""One lock for each layer among the processes that mount and unmount layers of one graph.

They ask the system, act, and count users: two processes that do so at the same time would count
one of them, or unmount what the other has just mounted.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from devmapper.deviceset.names import LayerId, file_name
from devmapper.engine.runtime import make_private
from devmapper.errors import LayerBusy
from devmapper.linux.files import locked_place

TIMEOUT_SECONDS: Final = 60.0  # more than a mount takes: one waits 5 for a busy device
_DIGEST_BYTES: Final = 7  # an offset in a file has 63 bits
_ELSEWHERE: Final = "another process, which mounts or unmounts it"


class ProcessLocks:
    """The locks of one graph's layers.  Not re-entrant; nothing of a killed process stays."""

    def __init__(self, file: Path, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """*file* is the same for all processes; made when needed."""
        self._file = file
        self._timeout = timeout

    @contextmanager
    def hold(self, layer: LayerId) -> Iterator[None]:
        """Keep other processes from the layer; `LayerBusy` when time is up.

        Call while holding the layer among the threads of this process: each that waits polls.
        """
        make_private(self._file.parent)
        lock = locked_place(self._file, _place(layer), timeout=self._timeout)
        try:
            lock.__enter__()
        except BlockingIOError as err:
            raise LayerBusy(file_name(layer), [_ELSEWHERE]) from err
        try:
            yield
        finally:
            lock.__exit__(None, None, None)


def _place(layer: LayerId) -> int:
    """Where in the file a layer's lock is."""
    return int.from_bytes(hashlib.blake2b(layer.encode(), digest_size=_DIGEST_BYTES).digest())
