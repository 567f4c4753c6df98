"""Ranges of bytes of a device and of inode numbers, and a set of the latter."""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final, NamedTuple

# Past every number that a file system here can have
END_OF_INODES: Final = 1 << 64


class InodeRange(NamedTuple):
    """Inode numbers from *begin* up to, but without, *end*."""

    begin: int
    end: int


class ByteRange(NamedTuple):
    """Bytes of a device from *begin* up to, but without, *end*."""

    begin: int
    end: int


class InodeSet:
    """Inode numbers as ranges: `number in set` is a binary search."""

    def __init__(self, ranges: Iterable[InodeRange]) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in sorted(ranges):
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._begins.append(begin)
                self._ends.append(end)

    def __contains__(self, inode: object) -> bool:
        if not isinstance(inode, int):
            return False
        at = bisect_right(self._begins, inode) - 1
        return at >= 0 and inode < self._ends[at]
