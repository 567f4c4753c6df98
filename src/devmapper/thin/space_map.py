"""Space maps: how often each block is referenced, and which block is free to allocate.

The counterparts of `dm-space-map-disk.c` (data) and `dm-space-map-metadata.c` (metadata).  On disk
both are bitmaps of two bits per block and a tree of the counts above two; they differ in where
the places of the bitmaps stand.

In memory a bitmap is one byte per block.  Counts change there; `flush` puts them into metadata
blocks.  So the metadata space map can change while it is being flushed, and repeats until nothing
is left.  A block that the last commit uses is never handed out in the transaction that freed it.

Not thread-safe.  A count that contradicts the caller is a `FormatError`: the pool is damaged, and
the transaction has to be aborted.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from devmapper.errors import FormatError, PoolFull, Space
from devmapper.thin import checksum
from devmapper.thin import format as layout
from devmapper.thin.btree import Btree
from devmapper.thin.format import ENTRIES_PER_BITMAP, OVERFLOW_COUNT, IndexEntry, SpaceMapRoot
from devmapper.thin.node import INDEX_ENTRY, REF_COUNT
from devmapper.thin.transaction_manager import TransactionManager

# What a byte of a bitmap in memory holds besides the counts 0 to 3; on disk all of it is 0.
_FREED: Final = 4  # in this transaction
_HELD: Final = 5  # free on disk, but the owner has not released it yet
_BEYOND: Final = 6  # behind the end of the device

_FREE_ON_DISK: Final = (0, _FREED, _HELD, _BEYOND)

_FREED_RUN: Final = re.compile(rb"\x04+")
_HELD_RUN: Final = re.compile(rb"\x05+")
_FREED_TO_HELD: Final = bytes.maketrans(bytes((_FREED,)), bytes((_HELD,)))
_FREED_TO_FREE: Final = bytes.maketrans(bytes((_FREED,)), b"\0")
_NEW_BITMAP: Final = IndexEntry(0, ENTRIES_PER_BITMAP, 0)

_CLEAN_BITMAPS: Final = 256  # kept in memory: 4 MiB
_DIRTY_BITMAPS: Final = 256  # before they are written early


class Run(NamedTuple):
    """Consecutive blocks."""

    begin: int
    length: int


class SpaceMap:
    """What both space maps have in common."""

    kind: Space

    def __init__(self, tm: TransactionManager, nr_blocks: int) -> None:
        self._tm = tm
        self.nr_blocks = nr_blocks
        self.nr_allocated = 0
        self._index: list[IndexEntry] = []
        self._bitmaps: OrderedDict[int, bytearray] = OrderedDict()
        self._dirty: set[int] = set()
        self._pending: set[int] = set()  # bitmaps with freed or held blocks
        self._nr_pending = 0
        self._cursor = 0  # no block below it can be allocated
        self._overflow: dict[int, int] = {}  # counts that the tree does not have yet
        self._counts = Btree[int](tm, REF_COUNT)
        self._counts_root = 0
        self._count_leaves = 1

    @property
    def nr_free(self) -> int:
        """Blocks without a reference, whether or not they can be allocated yet."""
        return self.nr_blocks - self.nr_allocated

    @property
    def nr_allocatable(self) -> int:
        return self.nr_blocks - self.nr_allocated - self._nr_pending

    @property
    def nr_dirty_bitmaps(self) -> int:
        return len(self._dirty)

    @property
    def nr_bitmaps(self) -> int:
        return len(self._index)

    @property
    def nr_overflow_changes(self) -> int:
        return len(self._overflow)

    def overflow_cost(self, changes: int, *, growing: bool = True) -> int:
        """Metadata blocks that *changes* of counts above two can take at most when flushed.

        Where counts only go down (not *growing*) the tree gets no new leaves.
        """
        if not changes:
            return 0
        return min(changes, self._count_leaves) + (changes // 80 if growing else 0) + 6

    def count(self, block: int) -> int:
        bitmap, at = self._place(block)
        value = bitmap[at]
        if value < OVERFLOW_COUNT:
            return value
        return self._overflow_count(block) if value == OVERFLOW_COUNT else 0

    def inc(self, block: int) -> None:
        index, at = divmod(block, ENTRIES_PER_BITMAP)
        bitmap = self._bitmap(index, block)
        value = bitmap[at]
        if value < 2:
            bitmap[at] = value + 1
            if not value:
                self.nr_allocated += 1
        elif value <= OVERFLOW_COUNT:
            self._overflow[block] = self._overflow_count(block) + 1 if value == 3 else 3
            bitmap[at] = OVERFLOW_COUNT
        else:
            self._check_pending(block, value)
            bitmap[at] = 1
            self.nr_allocated += 1
            self._nr_pending -= 1
        self._dirty.add(index)

    def inc_many(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.inc(block)

    def dec(self, block: int) -> int:
        """Return the count that is left."""
        index, at = divmod(block, ENTRIES_PER_BITMAP)
        bitmap = self._bitmap(index, block)
        value = bitmap[at]
        if value == 1:
            self._free(block, index, bitmap, at)
            self.nr_allocated -= 1
            left = 0
        elif value == 2:
            bitmap[at] = left = 1
        elif value == OVERFLOW_COUNT:
            left = self._overflow_count(block) - 1
            self._overflow[block] = left
            bitmap[at] = min(left, OVERFLOW_COUNT)
        else:
            raise FormatError(
                block, f"reference count of the {self.kind} block", want="above 0", got=0
            )
        self._dirty.add(index)
        return left

    def dec_many(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.dec(block)

    def allocate(self) -> int:
        return self.allocate_many(1)[0]

    def allocate_many(self, length: int) -> list[int]:
        """Take *length* blocks, ascending, contiguous where that is possible at no search."""
        if self.nr_allocatable < length:
            raise PoolFull(self.kind, free=self.nr_allocatable, needed=length)
        found: list[int] = []
        index, at = divmod(self._cursor, ENTRIES_PER_BITMAP)
        while len(found) < length:
            if index >= len(self._index):
                raise FormatError(
                    self._counts_root, f"free {self.kind} blocks", want=length, got=len(found)
                )
            if index in self._bitmaps or self._index[index].nr_free:
                at = self._take(index, at, length, found)
            else:
                at = ENTRIES_PER_BITMAP
            if at == ENTRIES_PER_BITMAP:
                index, at = index + 1, 0
        self.nr_allocated += length
        self._cursor = found[-1] + 1
        return found

    def _take(self, index: int, at: int, length: int, found: list[int]) -> int:
        """Take one run of bitmap *index* at or behind *at*; return where to go on."""
        bitmap = self._bitmap(index, index * ENTRIES_PER_BITMAP)
        at = bitmap.find(0, at)
        if at < 0:
            return ENTRIES_PER_BITMAP
        wanted = bitmap[at : at + length - len(found)]
        size = len(wanted) - len(wanted.lstrip(b"\0"))
        bitmap[at : at + size] = b"\x01" * size
        self._dirty.add(index)
        first = index * ENTRIES_PER_BITMAP + at
        found.extend(range(first, first + size))
        return at + size

    def grow(self, nr_blocks: int) -> None:
        """Manage *nr_blocks* from now on."""
        old, self.nr_blocks = self.nr_blocks, nr_blocks
        last, at = divmod(old, ENTRIES_PER_BITMAP)
        if at:
            bitmap = self._bitmap(last, old - 1)
            end = min(at + nr_blocks - old, ENTRIES_PER_BITMAP)
            bitmap[at:end] = bytes(end - at)
            # Other writers count only the blocks that exist as free.
            self._dirty.add(last)
        for index in range(len(self._index), -(-nr_blocks // ENTRIES_PER_BITMAP)):
            self._add_bitmap(index)
        self._cursor = min(self._cursor, old)

    def _place(self, block: int) -> tuple[bytearray, int]:
        index, at = divmod(block, ENTRIES_PER_BITMAP)
        return self._bitmap(index, block), at

    def _bitmap(self, index: int, block: int) -> bytearray:
        bitmap = self._bitmaps.get(index)
        if bitmap is None or not 0 <= block < self.nr_blocks:
            if not 0 <= block < self.nr_blocks:
                want = f"below {self.nr_blocks}"
                raise FormatError(block, f"{self.kind} block number", want=want, got=block)
            bitmap = self._load(index)
        return bitmap

    def _load(self, index: int) -> bytearray:
        place = self._index[index].blocknr
        raw = self._tm.read_block(place)
        checksum.check_block(raw, layout.BITMAP, place)
        return self._keep(index, layout.unpack_bitmap(raw))

    def _keep(self, index: int, bitmap: bytearray) -> bytearray:
        end = self.nr_blocks - index * ENTRIES_PER_BITMAP
        if end < ENTRIES_PER_BITMAP:
            bitmap[end:] = bytes((_BEYOND,)) * (ENTRIES_PER_BITMAP - end)
        self._bitmaps[index] = bitmap
        return bitmap

    def _overflow_count(self, block: int) -> int:
        count = self._overflow.get(block)
        if count is None:
            count = self._counts.lookup(self._counts_root, block)
            if count is None or count < OVERFLOW_COUNT:
                raise FormatError(
                    self._counts_root,
                    f"reference count of {self.kind} block {block}",
                    want="3 or more",
                    got=count,
                )
        return count

    def _check_pending(self, block: int, value: int) -> None:
        if value not in (_FREED, _HELD):
            raise FormatError(block, f"state of the {self.kind} block", want=_FREED, got=value)

    def _free(self, block: int, index: int, bitmap: bytearray, at: int) -> None:
        """Nobody refers to *block* any more."""
        bitmap[at] = _FREED
        self._nr_pending += 1
        self._pending.add(index)

    def _add_bitmap(self, index: int) -> None:
        raise NotImplementedError

    def _summary(self, place: int, bitmap: bytearray) -> IndexEntry:
        # `nr_free` is of a whole bitmap, also where the device ends earlier, as in sm_ll_extend.
        nr_free = ENTRIES_PER_BITMAP - sum(map(bitmap.count, (1, 2, 3)))
        first = [at for at in map(bitmap.find, _FREE_ON_DISK) if at >= 0]
        return IndexEntry(place, nr_free, min(first, default=ENTRIES_PER_BITMAP))

    def _write_bitmap(self, index: int) -> None:
        """Write a bitmap to its fresh block."""
        place = self._index[index].blocknr
        bitmap = self._bitmaps[index]
        self._tm.write_block(place, layout.BITMAP, layout.pack_bitmap(place, bitmap))
        self._index[index] = self._summary(place, bitmap)

    def _move_bitmap(self, index: int) -> None:
        entry = self._index[index]
        self._index[index] = entry._replace(blocknr=self._tm.shadow_block(entry.blocknr))

    def flush_overflow(self) -> None:
        """Put changed counts above two into their tree."""
        changes, self._overflow = self._overflow, {}
        if not changes:
            return
        large = sorted(block for block, count in changes.items() if count >= OVERFLOW_COUNT)
        counts = [changes[block] for block in large]
        self._counts_root = self._counts.insert_many(self._counts_root, large, counts).root
        small = (block for block, count in changes.items() if count < OVERFLOW_COUNT)
        for begin, length in _runs(sorted(small)):
            self._counts_root = self._counts.remove_range(
                self._counts_root, begin, begin + length
            ).root
        self._count_leaves = self._counts.count_leaves(self._counts_root)

    def _root(self, bitmap_root: int) -> SpaceMapRoot:
        return SpaceMapRoot(self.nr_blocks, self.nr_allocated, bitmap_root, self._counts_root)


class DataSpaceMap(SpaceMap):
    """Counts of data blocks; the places of its bitmaps stand in a tree.

    Freed blocks are held back until `release`, across commits: the owner first lets readers go
    and gives the space back to the file system.
    """

    kind = Space.DATA

    def __init__(self, tm: TransactionManager, nr_blocks: int) -> None:
        super().__init__(tm, nr_blocks)
        self._entries = Btree[bytes](tm, INDEX_ENTRY)
        self._entries_root = 0
        self._changed_entries: set[int] = set()

    @classmethod
    def create(cls, tm: TransactionManager, nr_blocks: int) -> "DataSpaceMap":
        self = cls(tm, 0)
        self._counts_root = self._counts.create()
        self._entries_root = self._entries.create()
        self.grow(nr_blocks)
        return self

    @classmethod
    def open(cls, tm: TransactionManager, root: SpaceMapRoot) -> "DataSpaceMap":
        self = cls(tm, root.nr_blocks)
        self.nr_allocated = root.nr_allocated
        self._counts_root = root.ref_count_root
        self._entries_root = root.bitmap_root
        nr_bitmaps = -(-root.nr_blocks // ENTRIES_PER_BITMAP)
        for keys, values in self._entries.leaves(root.bitmap_root, 0, nr_bitmaps):
            if keys[0] != len(self._index) or keys[-1] - keys[0] != len(keys) - 1:
                raise FormatError(
                    root.bitmap_root, "bitmap in the index", want=len(self._index), got=keys[0]
                )
            self._index.extend(map(IndexEntry.unpack, values))
        if len(self._index) != nr_bitmaps:
            raise FormatError(
                root.bitmap_root, "number of bitmaps", want=nr_bitmaps, got=len(self._index)
            )
        self._count_leaves = self._counts.count_leaves(root.ref_count_root)
        return self

    def _add_bitmap(self, index: int) -> None:
        # Written at once: a large device has thousands, which need not be in memory.
        place = self._tm.allocate()
        zeros = bytearray(ENTRIES_PER_BITMAP)
        self._tm.write_block(place, layout.BITMAP, layout.pack_bitmap(place, zeros))
        self._index.append(_NEW_BITMAP._replace(blocknr=place))
        self._changed_entries.add(index)

    def flush_cost(self, more: int = 0) -> int:
        """Metadata blocks that `flush` takes at most, with *more* dirty bitmaps than now."""
        dirty = min(len(self._dirty) + more, len(self._index))
        changed = dirty + len(self._changed_entries)
        leaves = min(changed, len(self._index) // 56 + 1)
        return dirty + leaves + 4 + self.overflow_cost(len(self._overflow))

    def trim(self) -> None:
        """Bound the memory that bitmaps take; call between operations only."""
        if len(self._dirty) > _DIRTY_BITMAPS:
            self._write_bitmaps()
        if len(self._bitmaps) <= _CLEAN_BITMAPS + len(self._dirty) + len(self._pending):
            return
        for index in list(self._bitmaps):
            if index not in self._dirty and index not in self._pending:
                del self._bitmaps[index]

    def flush(self) -> SpaceMapRoot:
        """Put all changes into metadata blocks; return the root that describes them."""
        self.flush_overflow()
        self._write_bitmaps()
        changed = sorted(self._changed_entries)
        packed = [self._index[index].pack() for index in changed]
        self._entries_root = self._entries.insert_many(self._entries_root, changed, packed).root
        self._changed_entries.clear()
        return self._root(self._entries_root)

    def _write_bitmaps(self) -> None:
        for index in sorted(self._dirty):
            self._move_bitmap(index)
            self._write_bitmap(index)
        self._changed_entries |= self._dirty
        self._dirty.clear()

    def committed(self) -> list[Run]:
        """The transaction is durable: return what it freed, now held until it is released."""
        runs: list[Run] = []
        for index in sorted(self._pending):
            bitmap = self._bitmaps[index]
            runs.extend(_spans(_FREED_RUN, index, bitmap))
            bitmap[:] = bitmap.translate(_FREED_TO_HELD)
        return _joined(runs)

    def held(self) -> list[Run]:
        """Runs freed by commits before this transaction and not released yet."""
        return [
            run
            for index in sorted(self._pending)
            for run in _spans(_HELD_RUN, index, self._bitmaps[index])
        ]

    def hold(self, runs: Iterable[Run]) -> None:
        """Hold free blocks back, after an abort has made a new space map."""
        for index, low, high in _pieces(runs):
            self._bitmap(index, index * ENTRIES_PER_BITMAP)[low:high] = bytes((_HELD,)) * (
                high - low
            )
            self._pending.add(index)
            self._nr_pending += high - low

    def release(self, runs: Iterable[Run]) -> None:
        """Held blocks may be allocated again."""
        for index, low, high in _pieces(runs):
            bitmap = self._bitmap(index, index * ENTRIES_PER_BITMAP)
            if bitmap.count(_HELD, low, high) != high - low:
                raise ValueError(f"not all of {low} to {high} in bitmap {index} are held")
            bitmap[low:high] = bytes(high - low)
            self._nr_pending -= high - low
            self._cursor = min(self._cursor, index * ENTRIES_PER_BITMAP + low)
            if bitmap.find(_HELD) < 0 and bitmap.find(_FREED) < 0:
                self._pending.discard(index)


class MetadataSpaceMap(SpaceMap):
    """Counts of metadata blocks, its own among them; the places of its bitmaps fill one block."""

    kind = Space.METADATA

    def __init__(self, tm: TransactionManager, nr_blocks: int) -> None:
        super().__init__(tm, nr_blocks)
        self._index_block = 0

    @classmethod
    def create(
        cls, tm: TransactionManager, nr_blocks: int, references: Iterable[int] = ()
    ) -> "MetadataSpaceMap":
        """Manage a device that has no space map yet, but will have a superblock.

        *references* are the blocks that are in use already, each as often as it is referred to.
        """
        self = cls(tm, 0)
        tm.attach(self)
        self.grow(nr_blocks)
        self.inc(layout.SUPERBLOCK_LOCATION)
        self.inc_many(references)
        self._cursor = 1
        self._counts_root = self._counts.create()
        return self

    @classmethod
    def open(cls, tm: TransactionManager, root: SpaceMapRoot) -> "MetadataSpaceMap":
        self = cls(tm, root.nr_blocks)
        tm.attach(self)
        self.nr_allocated = root.nr_allocated
        self._counts_root = root.ref_count_root
        self._index_block = root.bitmap_root
        raw = tm.read_block(root.bitmap_root)
        checksum.check_block(raw, layout.METADATA_INDEX, root.bitmap_root)
        nr_bitmaps = -(-root.nr_blocks // ENTRIES_PER_BITMAP)
        self._index = list(layout.MetadataIndex.unpack(raw).entries[:nr_bitmaps])
        self._count_leaves = self._counts.count_leaves(root.ref_count_root)
        return self

    def _add_bitmap(self, index: int) -> None:
        self._index.append(_NEW_BITMAP)
        self._keep(index, bytearray(ENTRIES_PER_BITMAP))
        self._dirty.add(index)

    def _free(self, block: int, index: int, bitmap: bytearray, at: int) -> None:
        if self._tm.is_fresh(block):
            bitmap[at] = 0
            self._cursor = min(self._cursor, block)
        else:
            super()._free(block, index, bitmap, at)

    def flush_cost(self) -> int:
        """Metadata blocks that `flush` takes at most."""
        return len(self._index) + 1 + self.overflow_cost(len(self._overflow))

    def flush(self) -> SpaceMapRoot:
        """Put all changes into metadata blocks; return the root that describes them."""
        moved: set[int] = set()
        self._index_block = self._tm.shadow_block(self._index_block)
        while self._overflow or self._dirty - moved:
            self.flush_overflow()
            for index in sorted(self._dirty - moved):
                self._move_bitmap(index)
                moved.add(index)
        for index in sorted(moved):
            self._write_bitmap(index)
        self._dirty.clear()
        block = layout.MetadataIndex(0, 0, self._index_block, tuple(self._index))
        self._tm.write_block(self._index_block, layout.METADATA_INDEX, block.pack())
        return self._root(self._index_block)

    def committed(self) -> None:
        """The transaction is durable: what it freed may be allocated."""
        for index in self._pending:
            bitmap = self._bitmaps[index]
            first = index * ENTRIES_PER_BITMAP + max(bitmap.find(_FREED), 0)
            self._cursor = min(self._cursor, first)
            bitmap[:] = bitmap.translate(_FREED_TO_FREE)
        self._pending.clear()
        self._nr_pending = 0


def _runs(blocks: Iterable[int]) -> Iterator[Run]:
    """Join ascending block numbers."""
    begin = end = -1
    for block in blocks:
        if block != end:
            if end > begin:
                yield Run(begin, end - begin)
            begin = block
        end = block + 1
    if end > begin:
        yield Run(begin, end - begin)


def _spans(pattern: "re.Pattern[bytes]", index: int, bitmap: bytearray) -> Iterator[Run]:
    first = index * ENTRIES_PER_BITMAP
    for match in pattern.finditer(bitmap):
        yield Run(first + match.start(), match.end() - match.start())


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Join runs that touch where one bitmap ends and the next begins."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].begin + joined[-1].length == run.begin:
            run = Run(joined[-1].begin, joined[-1].length + run.length)
            joined[-1] = run
        else:
            joined.append(run)
    return joined


def _pieces(runs: Iterable[Run]) -> Iterator[tuple[int, int, int]]:
    """Cut runs at the borders of bitmaps: bitmap, first and last + 1 entry."""
    for begin, length in runs:
        while length > 0:
            index, low = divmod(begin, ENTRIES_PER_BITMAP)
            high = min(low + length, ENTRIES_PER_BITMAP)
            yield index, low, high
            begin, length = begin + high - low, length - (high - low)
