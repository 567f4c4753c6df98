"""Counting how often blocks are referred to, in about one byte per block that is."""

from collections import Counter
from collections.abc import Iterable

from devmapper.thin.format import ENTRIES_PER_BITMAP, OVERFLOW_COUNT


class RefCounts:
    """Reference counts of blocks, kept in the shape of a space map.

    A row holds the counts of one bitmap, a byte each, and stops at OVERFLOW_COUNT as a bitmap does;
    what goes beyond is counted apart.
    """

    def __init__(self) -> None:
        self._rows: dict[int, bytearray] = {}
        self._beyond: Counter[int] = Counter()

    def increment(self, blocks: Iterable[int]) -> None:
        rows = self._rows
        for block in blocks:
            at, entry = divmod(block, ENTRIES_PER_BITMAP)
            row = rows.get(at)
            if row is None:
                row = rows[at] = bytearray(ENTRIES_PER_BITMAP)
            if row[entry] < OVERFLOW_COUNT:
                row[entry] += 1
            else:
                self._beyond[block] += 1

    def row(self, at: int) -> bytes:
        """What bitmap *at* must hold."""
        return bytes(self._rows.get(at, bytes(ENTRIES_PER_BITMAP)))

    def __getitem__(self, block: int) -> int:
        at, entry = divmod(block, ENTRIES_PER_BITMAP)
        row = self._rows.get(at)
        return 0 if row is None else row[entry] + self._beyond[block]
