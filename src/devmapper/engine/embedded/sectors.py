"""Reads and writes of any alignment on a target that knows whole sectors only."""

import threading

from devmapper.engine.embedded.target import BlockTarget
from devmapper.units import SECTOR_SIZE


class Sectors:
    """The bytes of a target.  Who shares a sector with a neighbour shares this object with it."""

    def __init__(self, target: BlockTarget) -> None:
        self._target = target
        self._edges = threading.Lock()

    def read(self, offset: int, view: memoryview) -> None:
        """Fill *view*, which lies inside the target."""
        start, end = _whole(offset, len(view))
        sectors = memoryview(bytearray(end - start))
        self._target.read(start, sectors)
        view[:] = sectors[offset - start : offset - start + len(view)]

    def write(self, offset: int, view: memoryview) -> None:
        """Store *view*, which lies inside the target; what else its sectors hold stays.

        Neighbours share a sector and arrive at once, hence the lock.
        """
        start, end = _whole(offset, len(view))
        sectors = memoryview(bytearray(end - start))
        with self._edges:
            self._target.read(start, sectors[:SECTOR_SIZE])
            self._target.read(end - SECTOR_SIZE, sectors[-SECTOR_SIZE:])
            sectors[offset - start : offset - start + len(view)] = view
            self._target.write(start, sectors)


def _whole(offset: int, length: int) -> tuple[int, int]:
    start = offset // SECTOR_SIZE * SECTOR_SIZE
    return start, -(-(offset + length) // SECTOR_SIZE) * SECTOR_SIZE
