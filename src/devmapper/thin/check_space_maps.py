"""Checking the two space maps: first what they are made of, then what they say.

Their own blocks count as metadata, so nothing can be compared before both have been walked.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable
from typing import Final, NamedTuple

from devmapper.errors import FormatError, IntegrityError
from devmapper.thin.check_trees import TreeChecker
from devmapper.thin.damage import Damage, DamageKind, DamageLog
from devmapper.thin.format import (
    BITMAP,
    ENTRIES_PER_BITMAP,
    INDEX_ENTRY_SIZE,
    MAX_METADATA_BITMAPS,
    METADATA_INDEX,
    OVERFLOW_COUNT,
    REF_COUNT_SIZE,
    IndexEntry,
    MetadataIndex,
    SpaceMapRoot,
    unpack_bitmap,
)
from devmapper.thin.ref_counts import RefCounts
from devmapper.thin.walk import (
    DATA_REF_COUNTS,
    INDEX,
    METADATA_REF_COUNTS,
    BlockReader,
    Node,
    Tree,
    read_block,
)

DATA: Final = "data"
METADATA: Final = "metadata"
_TOO_LOW: Final = {DATA: DamageKind.DATA_REF_COUNT, METADATA: DamageKind.METADATA_REF_COUNT}
_OnLeaf = Callable[[Node], tuple[int, ...]]


class SpaceMap(NamedTuple):
    """A space map as far as it could be read; the overflow counts are sorted by block."""

    space: str
    root: SpaceMapRoot
    entries: dict[int, IndexEntry]
    blocks: "array[int]"
    counts: "array[int]"
    complete: bool

    @property
    def nr_bitmaps(self) -> int:
        return -(-self.root.nr_blocks // ENTRIES_PER_BITMAP)


class SpaceMapWalker:
    """Walks both space maps and counts the metadata blocks that they are made of."""

    def __init__(
        self, device: BlockReader, *, log: DamageLog, counts: RefCounts, claims: dict[int, Tree]
    ) -> None:
        self._device = device
        self._log = log
        self._counts = counts
        self._claims = claims
        self.incomplete = False  # a part could not be read, so references in it are not counted

    def metadata(self, root: SpaceMapRoot) -> SpaceMap | None:
        """Walk the space map of metadata; None where its size is nonsense."""
        limit = min(self._device.nr_blocks, MAX_METADATA_BITMAPS * ENTRIES_PER_BITMAP)
        if self._too_large(METADATA, root, limit):
            return None
        before = len(self._log)
        self._count(root.bitmap_root)
        try:
            raw = read_block(self._device, root.bitmap_root, METADATA_INDEX)
        except (IntegrityError, OSError) as err:
            self._log.add(DamageKind.INDEX, root.bitmap_root, f"{METADATA} space map: {err}")
            self.incomplete = True
            return None
        nr_bitmaps = -(-root.nr_blocks // ENTRIES_PER_BITMAP)
        index = MetadataIndex.unpack(raw)
        entries = dict(enumerate(index.entries[:nr_bitmaps]))
        return self._with_overflow(METADATA, root, entries, METADATA_REF_COUNTS, before)

    def data(self, root: SpaceMapRoot) -> SpaceMap | None:
        """Walk the space map of data; None where its size is nonsense."""
        if self._too_large(DATA, root, self._device.nr_blocks * ENTRIES_PER_BITMAP):
            return None
        before = len(self._log)
        entries: dict[int, IndexEntry] = {}

        def on_leaf(node: Node) -> tuple[int, ...]:
            for at, key in enumerate(node.keys):
                value = node.values[at * INDEX_ENTRY_SIZE : (at + 1) * INDEX_ENTRY_SIZE]
                entries[key] = IndexEntry.unpack(value)
            return ()

        self._check_tree(root.bitmap_root, INDEX, DamageKind.INDEX, on_leaf)
        space_map = self._with_overflow(DATA, root, entries, DATA_REF_COUNTS, before)
        wanted = range(space_map.nr_bitmaps)
        if space_map.complete and entries.keys() != set(wanted):
            odd = min(entries.keys() ^ set(wanted))
            what = "is missing" if odd in wanted else f"lies beyond the {len(wanted)} bitmaps"
            message = f"{INDEX.name}: index entry {odd} {what}"
            self._log.add(DamageKind.INDEX, root.bitmap_root, message)
            return space_map._replace(complete=False)
        return space_map

    def _with_overflow(
        self,
        space: str,
        root: SpaceMapRoot,
        entries: dict[int, IndexEntry],
        tree: Tree,
        before: int,
    ) -> SpaceMap:
        for entry in entries.values():
            self._count(entry.blocknr)
        blocks, counts = array("Q"), array("Q")

        def on_leaf(node: Node) -> tuple[int, ...]:
            blocks.extend(node.keys)
            size = REF_COUNT_SIZE
            packed = (node.values[at : at + size] for at in range(0, len(node.values), size))
            counts.extend(int.from_bytes(value, "little") for value in packed)
            return ()

        self._check_tree(root.ref_count_root, tree, DamageKind.NODE, on_leaf)
        complete = len(self._log) == before
        return SpaceMap(space, root, entries, blocks, counts, complete)

    def _check_tree(self, root: int, tree: Tree, kind: DamageKind, on_leaf: _OnLeaf) -> None:
        checker = TreeChecker(
            self._device,
            tree,
            log=self._log,
            counts=self._counts,
            claims=self._claims,
            kind=kind,
            on_leaf=on_leaf,
        )
        checker.check(root)
        self.incomplete |= checker.incomplete

    def _count(self, block: int) -> None:
        if block < self._device.nr_blocks:
            self._counts.increment((block,))

    def _too_large(self, space: str, root: SpaceMapRoot, limit: int) -> bool:
        if root.nr_blocks <= limit:
            return False
        field = f"nr_blocks of the {space} space map"
        error = FormatError(0, field, want=f"at most {limit}", got=root.nr_blocks)
        self._log.add(DamageKind.SUPERBLOCK, 0, str(error))
        self.incomplete = True
        return True


class Comparison:
    """Compares what a space map says with itself and with what the trees refer to.

    Without *counts* it is compared with itself only.  Where *counts_are_complete* is not given,
    trees could not be read in full: a stored count that is too high then means nothing.
    """

    def __init__(
        self,
        device: BlockReader,
        space_map: SpaceMap,
        *,
        log: DamageLog,
        counts: RefCounts | None,
        counts_are_complete: bool,
    ) -> None:
        self._device = device
        self._map = space_map
        self._log = log
        self._counts = counts
        self._counts_are_complete = counts_are_complete
        self._allocated = 0
        self._unread = not space_map.complete
        self._run: Damage | None = None
        self._run_key: tuple[object, ...] = ()
        self.leaked_blocks = 0

    def run(self) -> int:
        """Compare all of it; returns how many blocks are leaked."""
        for at in range(self._map.nr_bitmaps):
            entry = self._map.entries.get(at)
            if entry is not None:
                self._bitmap(at, entry)
        self._end_run()
        stored = self._map.root.nr_allocated
        if not self._unread and stored != self._allocated:
            field = f"nr_allocated of the {self._map.space} space map"
            error = FormatError(0, field, want=self._allocated, got=stored)
            damage = Damage(DamageKind.SUPERBLOCK, 0, str(error))
            self._summary_is_off(damage, harmless=stored > self._allocated)
        return self.leaked_blocks

    def _bitmap(self, at: int, entry: IndexEntry) -> None:
        first = at * ENTRIES_PER_BITMAP
        used = min(ENTRIES_PER_BITMAP, self._map.root.nr_blocks - first)
        try:
            stored = unpack_bitmap(read_block(self._device, entry.blocknr, BITMAP))
        except (IntegrityError, OSError) as err:
            self._unread = True
            message = (
                f"{self._map.space} space map: {err}, for blocks {first} to {first + used - 1}"
            )
            self._log.add(DamageKind.BITMAP, entry.blocknr, message)
            return
        self._summary(at, entry, stored, used)
        self._overflow(entry, stored, first, used)
        if self._counts is not None:
            self._compare(bytes(stored[:used]), first, at)

    def _summary(self, at: int, entry: IndexEntry, stored: bytearray, used: int) -> None:
        free = stored.count(0, 0, used)
        self._allocated += used - free
        # The kernel counts the entries behind the last block as free, thin_restore does not.
        behind = ENTRIES_PER_BITMAP - used
        if entry.nr_free not in (free, free + behind):
            what = f"nr_free of index entry {at} is {entry.nr_free}, expected {free + behind}"
            self._odd_index(entry, what, harmless=entry.nr_free < free)
        first_free = stored.find(0, 0, used)
        if 0 <= first_free < entry.none_free_before:
            hint = f"none_free_before of index entry {at} is {entry.none_free_before}"
            self._odd_index(entry, f"{hint}, but entry {first_free} is free", harmless=True)

    def _odd_index(self, entry: IndexEntry, what: str, *, harmless: bool) -> None:
        message = f"{self._map.space} space map, bitmap {entry.blocknr}: {what}"
        self._summary_is_off(Damage(DamageKind.INDEX, entry.blocknr, message), harmless=harmless)

    def _summary_is_off(self, damage: Damage, *, harmless: bool) -> None:
        if harmless and self._map.space == METADATA:
            self._log.notes.append(damage)
        else:
            self._log.note(damage)

    def _overflow(self, entry: IndexEntry, stored: bytearray, first: int, used: int) -> None:
        """Every 3 in the bitmap needs an entry in the ref count tree, and nothing else has one."""
        begin = bisect_left(self._map.blocks, first)
        end = bisect_left(self._map.blocks, first + used)
        threes = stored.count(OVERFLOW_COUNT, 0, used)
        if (not threes and begin == end) or not self._map.complete:
            return
        in_bitmap = {first + i for i in range(used) if stored[i] == OVERFLOW_COUNT}
        in_tree = set(self._map.blocks[begin:end])
        for block in sorted(in_bitmap - in_tree):
            self._odd_count(entry, f"block {block} has no count in the ref count tree")
        for block in sorted(in_tree - in_bitmap):
            stale = f"but its bitmap says {stored[block - first]}"
            self._odd_count(entry, f"block {block} has a count in the ref count tree, {stale}")

    def _odd_count(self, entry: IndexEntry, what: str) -> None:
        self._log.add(DamageKind.BITMAP, entry.blocknr, f"{self._map.space} space map: {what}")

    def _compare(self, stored: bytes, first: int, at: int) -> None:
        counts = self._counts
        assert counts is not None  # noqa: S101 - asked by the only caller
        wanted = counts.row(at)[: len(stored)]
        if stored == wanted and OVERFLOW_COUNT not in stored:
            return
        for i, (got, want) in enumerate(zip(stored, wanted, strict=True)):
            if got == OVERFLOW_COUNT or got != want:
                block = first + i
                got = self._stored_count(block) if got == OVERFLOW_COUNT else got
                if got != counts[block]:
                    self._differs(block, got=got, want=counts[block])

    def _stored_count(self, block: int) -> int:
        at = bisect_left(self._map.blocks, block)
        found = at < len(self._map.blocks) and self._map.blocks[at] == block
        return self._map.counts[at] if found else OVERFLOW_COUNT

    def _differs(self, block: int, *, got: int, want: int) -> None:
        if got > want:
            if not self._counts_are_complete:
                return
            self.leaked_blocks += 1
        key = (got, want)
        run = self._run
        if run is not None and self._run_key == key and run.block + run.nr_blocks == block:
            self._run = run._replace(nr_blocks=run.nr_blocks + 1)
            return
        self._end_run()
        kind = DamageKind.LEAK if got > want else _TOO_LOW[self._map.space]
        message = f"reference count is {got}, expected {want}"
        self._run = Damage(kind, block, message, space=self._map.space)
        self._run_key = key

    def _end_run(self) -> None:
        run = self._run
        if run is None:
            return
        last = run.block + run.nr_blocks - 1
        blocks = f"block {last}" if run.nr_blocks == 1 else f"blocks {run.block} to {last}"
        self._log.note(run._replace(message=f"{run.space} {blocks}: {run.message}"))
        self._run = None
