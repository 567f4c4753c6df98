"""The mappings of one open thin device, as far as they were looked up.

Chunks of consecutive thin blocks, each an array of raw mappings (`data block << 24 | time`).
Looking up takes no lock: the dictionary and the items of an array are read atomically.  Everything
that changes the cache runs under the metadata lock of the pool, together with the change that it
follows, so a chunk is never older than the metadata it was read from.
"""

from array import array
from typing import Final

from devmapper.thin.format import MAX_TIME, UNMAPPED

CHUNK_BITS: Final = 12
CHUNK_BLOCKS: Final = 1 << CHUNK_BITS
CHUNK_MASK: Final = CHUNK_BLOCKS - 1
MAX_CHUNKS: Final = 256  # 8 MiB, and 64 GiB of a device with blocks of 64 KiB

TIME_MASK: Final = MAX_TIME  # a packed mapping is its data block, then its time
TIME_BITS: Final = MAX_TIME.bit_length()

_NOTHING: Final = array("Q", [UNMAPPED]) * CHUNK_BLOCKS


class MappingCache:
    """`chunks` by number of chunk; the data path reads it directly."""

    __slots__ = ("chunks",)

    def __init__(self) -> None:
        self.chunks: dict[int, array[int]] = {}

    def add(self, number: int, chunk: "array[int]") -> None:
        """Keep a chunk; the one that came first goes when there are too many.

        A hit keeps no books, so there is no telling which one was used last.
        """
        if len(self.chunks) >= MAX_CHUNKS:
            del self.chunks[next(iter(self.chunks))]
        self.chunks[number] = chunk

    def put(self, block: int, raw: int) -> None:
        """Follow a new mapping; a chunk that is not there is left out."""
        chunk = self.chunks.get(block >> CHUNK_BITS)
        if chunk is not None:
            chunk[block & CHUNK_MASK] = raw

    def forget(self, begin: int, end: int) -> None:
        """Follow the removal of the mappings of thin blocks *begin* to *end*."""
        for number in [
            n for n in self.chunks if begin >> CHUNK_BITS <= n <= (end - 1) >> CHUNK_BITS
        ]:
            first = number << CHUNK_BITS
            low, high = max(begin - first, 0), min(end - first, CHUNK_BLOCKS)
            self.chunks[number][low:high] = _NOTHING[: high - low]

    def clear(self) -> None:
        self.chunks.clear()
