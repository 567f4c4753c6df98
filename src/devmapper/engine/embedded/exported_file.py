"""One file of the export: a block target, its number, its users, and what waits for it.

A target may block for long: while its device is suspended, while a full pool queues writes.  The
requests that arrive meanwhile must not take one worker after another away from all other files, so
a file that is *stalled* keeps further requests here until one of those under way comes back.
"""

import errno
import logging
import threading
from collections import deque
from typing import Final, NamedTuple

from devmapper.engine.embedded.sectors import Sectors
from devmapper.engine.embedded.target import BlockTarget
from devmapper.linux.fuse import FallocateMode, Opcode
from devmapper.units import SECTOR_SIZE

log = logging.getLogger(__name__)

_PUNCH: Final = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE
_ZERO_MODES: Final = frozenset(
    {FallocateMode.ZERO_RANGE, FallocateMode.ZERO_RANGE | FallocateMode.KEEP_SIZE}
)


class Request(NamedTuple):
    """A request for the data of a file; the buffer is empty unless it is a READ or a WRITE."""

    opcode: int
    unique: int
    offset: int
    length: int
    mode: int  # of FALLOCATE
    buffer: memoryview


class ExportedFile:
    """A named `BlockTarget`.  `opens` and `leaving` belong to the export's lock."""

    def __init__(self, name: str, node_id: int, target: BlockTarget) -> None:
        self.name = name
        self.node_id = node_id
        self.target = target
        self.size = int(target.size)  # read with every request, so it is not asked each time
        self.opens = 0
        self.leaving = False
        self.stalled = False
        self._waiting: deque[Request] = deque()
        self._lock = threading.Lock()
        self._sectors = Sectors(target)
        self._reported: set[type[Exception]] = set()

    def read_slowly(self, offset: int, view: memoryview) -> int:
        """Read what is not aligned to sectors or passes the end; how much of *view* is filled."""
        length = max(0, min(len(view), self.size - offset))
        if length:
            self._sectors.read(offset, view[:length])
        return length

    def write_slowly(self, offset: int, view: memoryview) -> None:
        """Write what is not aligned to sectors.

        No loop device asks for this.  A program that writes the file itself does, even with large
        and round writes: FUSE splits them by pages of its memory.
        """
        if offset + len(view) > self.size:
            raise OSError(errno.ENOSPC, "write beyond the end of the device", self.name)
        self._sectors.write(offset, view)

    def fallocate(self, offset: int, length: int, mode: int) -> None:
        """Punching a hole is a discard, zeroing a range is write-zeroes; there is nothing else."""
        if (offset | length) & (SECTOR_SIZE - 1):
            raise OSError(errno.EINVAL, "range is not aligned to sectors", self.name)
        if mode == _PUNCH:
            if offset < self.size:
                self.target.discard(offset, min(length, self.size - offset))
        elif mode in _ZERO_MODES:
            if offset + length > self.size:
                raise OSError(errno.ENOSPC, "range ends beyond the device", self.name)
            self.target.write_zeroes(offset, length)
        else:
            raise OSError(errno.EOPNOTSUPP, f"fallocate mode {mode:#x}", self.name)

    def keep_for_later(self, request: Request) -> bool:
        """Queue a request of a stalled file; False if it is stalled no more and may be served.

        What is to be written is copied: the buffer belongs to the worker.
        """
        with self._lock:
            if not self.stalled:
                return False
            if request.opcode == Opcode.WRITE:
                request = request._replace(buffer=memoryview(bytes(request.buffer)))
            self._waiting.append(request)
            return True

    def stall(self) -> None:
        with self._lock:
            self.stalled = True

    def next_waiting(self) -> Request | None:
        """Take a queued request; when none is left the file is stalled no more."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self.stalled = False
            return None

    def report(self, error: Exception) -> None:
        """Log a bug of the target with its traceback, the first time each kind is seen."""
        kind = type(error)
        if kind in self._reported:
            log.debug("again in device %s: %r", self.name, error)
            return
        self._reported.add(kind)
        log.error("unexpected exception in device %s", self.name, exc_info=error)
