"""Holes in files: found without reading them, and made where there are only zeros.

A thin device provisions a block for every zero that is written to it, and none for a hole.
"""

import os
from collections.abc import Iterator
from errno import ENXIO
from typing import Final

_STAT_BLOCK: Final = 512  # what st_blocks counts, stat(2)
_HOLE: Final = 4096  # blocks of zeros of this size are left out
_ZEROS: Final = bytes(_HOLE)


def data_ranges(fd: int, status: os.stat_result) -> Iterator[tuple[int, int]]:
    """Where the file has data: (start, end), ascending; all of it where holes are unknown."""
    size = status.st_size
    if status.st_blocks * _STAT_BLOCK >= size:
        yield 0, size
        return
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as err:
            if err.errno == ENXIO:  # nothing but a hole is left
                return
            raise
        if start >= size:
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end


def write_sparse(fd: int, buffer: bytearray, length: int, offset: int) -> int:
    """Write the first *length* bytes of *buffer* at *offset*, whole blocks of zeros as holes.

    The file has to be new.  Returns where the last data ended.
    """
    view = memoryview(buffer)
    position = end = 0
    while position < length:
        while position + _HOLE <= length and buffer.startswith(_ZEROS, position):
            position += _HOLE
        start = position
        while position < length and not (
            position + _HOLE <= length and buffer.startswith(_ZEROS, position)
        ):
            position += _HOLE
        if start < position:
            end = min(position, length)
        while start < end:
            start += os.pwrite(fd, view[start:end], offset + start)
    return offset + end
