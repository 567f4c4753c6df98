"""How the mappings of two thin devices differ, as `thin_delta` finds it.

Both trees are read side by side in key order.  A node that both trees reach at the same place needs
no look inside to know that it is equal, so the work grows with the difference of two snapshots and
not with their size, unless the runs that are equal are wanted, too.
"""

from bisect import bisect_left
from collections.abc import Iterator
from enum import StrEnum
from typing import Final, NamedTuple

from devmapper.errors import FormatError, ThinIdMissing
from devmapper.thin.format import MAX_BTREE_DEPTH, MAX_KEY, Superblock, unpack_u64s
from devmapper.thin.walk import (
    ALL_KEYS,
    DEVICES,
    MAPPINGS,
    BlockReader,
    Subtree,
    lookup,
    open_superblock,
    reached_twice,
    read_subtree,
    subtrees,
)

_END: Final = MAX_KEY + 1


class DeltaKind(StrEnum):
    """The words of `thin_delta`, but for `differ`, which it spells "different"."""

    SAME = "same"
    DIFFER = "differ"
    LEFT_ONLY = "left_only"
    RIGHT_ONLY = "right_only"


class DeltaRun(NamedTuple):
    """Blocks *begin* to *begin* + *length* of both thin devices; blocks that none maps are in none.

    `SAME` means the same data blocks, `DIFFER` different ones, whatever is in them.
    """

    begin: int
    length: int
    kind: DeltaKind


class ChangedRange(NamedTuple):
    """Blocks that may read differently on two thin devices."""

    begin: int
    length: int


def delta(
    device: BlockReader,
    thin_a: int,
    thin_b: int,
    *,
    metadata_snap: bool = False,
    include_same: bool = True,
) -> Iterator[DeltaRun]:
    """Yield the runs of equal kind in ascending order, each as long as can be.

    Without *include_same* runs of kind `SAME` are left out, and shared subtrees are not read.
    Raises `ThinIdMissing`, and `IntegrityError` where damage is met.
    """
    superblock = open_superblock(device, metadata_snap=metadata_snap)
    return _runs(device, superblock, thin_a, thin_b, include_same=include_same)


def _runs(
    device: BlockReader, superblock: Superblock, thin_a: int, thin_b: int, *, include_same: bool
) -> Iterator[DeltaRun]:
    left = _Side(device, _mapping_root(device, superblock.data_mapping_root, thin_a))
    right = _Side(device, _mapping_root(device, superblock.data_mapping_root, thin_b))
    run: DeltaRun | None = None
    for begin, length, kind in _pieces(device, left, right, include_same=include_same):
        if run is not None and run.kind == kind and run.begin + run.length == begin:
            run = DeltaRun(run.begin, run.length + length, kind)
            continue
        if run is not None:
            yield run
        run = DeltaRun(begin, length, kind)
    if run is not None:
        yield run


def changed_ranges(
    device: BlockReader, thin_a: int, thin_b: int, *, metadata_snap: bool = False
) -> Iterator[ChangedRange]:
    """Yield where two thin devices may differ in content: the runs that are not `SAME`, merged."""
    superblock = open_superblock(device, metadata_snap=metadata_snap)
    return _changed_below(device, superblock, thin_a, thin_b)


def bounded_ranges(
    device: BlockReader, superblock: Superblock, thin_a: int, thin_b: int, *, limit: int
) -> list[ChangedRange]:
    """`changed_ranges` below a superblock that was read already, *limit* of them at most.

    Where there are more, the nearest ones are merged, so that no range is lost and memory does not
    grow with the devices.
    """
    found: list[ChangedRange] = []
    gap = 0
    for each in _changed_below(device, superblock, thin_a, thin_b):
        if found and each.begin - _end(found[-1]) <= gap:
            found[-1] = ChangedRange(found[-1].begin, _end(each) - found[-1].begin)
            continue
        found.append(each)
        while len(found) > limit:
            gap = 2 * gap + 1
            found = _merged(found, gap)
    return found


def own_blocks(device: BlockReader, superblock: Superblock, thin_a: int, thin_b: int) -> int:
    """How many data blocks *thin_a* maps that *thin_b* does not have in the same place."""
    runs = _runs(device, superblock, thin_a, thin_b, include_same=False)
    return sum(run.length for run in runs if run.kind is not DeltaKind.RIGHT_ONLY)


def _end(run: ChangedRange) -> int:
    return run.begin + run.length


def _merged(ranges: list[ChangedRange], gap: int) -> list[ChangedRange]:
    merged = ranges[:1]
    for each in ranges[1:]:
        last = merged[-1]
        if each.begin - _end(last) <= gap:
            merged[-1] = ChangedRange(last.begin, _end(each) - last.begin)
        else:
            merged.append(each)
    return merged


def _changed_below(
    device: BlockReader, superblock: Superblock, thin_a: int, thin_b: int
) -> Iterator[ChangedRange]:
    begin = end = 0
    for run in _runs(device, superblock, thin_a, thin_b, include_same=False):
        if run.begin != end and end > begin:
            yield ChangedRange(begin, end - begin)
        if run.begin != end:
            begin = run.begin
        end = run.begin + run.length
    if end > begin:
        yield ChangedRange(begin, end - begin)


def _mapping_root(device: BlockReader, top_level: int, thin_id: int) -> int:
    value = lookup(device, top_level, thin_id, DEVICES)
    if value is None:
        raise ThinIdMissing(thin_id)
    return unpack_u64s(value)[0]


class _Side:
    """One tree, read as far as asked: mappings that wait to be compared, subtrees yet unread."""

    def __init__(self, device: BlockReader, root: int) -> None:
        self._device = device
        self._pending = [(Subtree(root, ALL_KEYS), _height(device, root))]
        self._seen: set[int] = set()
        self._keys: list[int] = []
        self._blocks: list[int] = []

    @property
    def place(self) -> Subtree | None:
        """The first subtree that has not been read."""
        return self._pending[-1][0] if self._pending else None

    @property
    def order(self) -> tuple[int, int]:
        """Sorts before the other side's when this side has to be read first."""
        if not self._pending:
            return (1, 0)  # nothing left to read
        place, height = self._pending[-1]
        return (-height, place.keys.begin)

    def skip(self) -> None:
        self._pending.pop()

    def expand(self) -> None:
        """Read the first pending subtree: its children take its place, or its mappings wait."""
        place, height = self._pending.pop()
        if place.block in self._seen:
            raise reached_twice(place.block, MAPPINGS)
        self._seen.add(place.block)
        node = read_subtree(self._device, place, MAPPINGS)
        if node.is_leaf:
            self._keys += node.keys
            self._blocks += node.data_blocks()
        else:
            below = subtrees(node, place.keys)
            self._pending.extend((child, height - 1) for child in reversed(below))

    def take(self, bound: int) -> dict[int, int]:
        """Remove and return the waiting mappings with keys less than *bound*."""
        at = bisect_left(self._keys, bound)
        taken = dict(zip(self._keys[:at], self._blocks[:at], strict=True))
        del self._keys[:at], self._blocks[:at]
        return taken


def _height(device: BlockReader, root: int) -> int:
    """Levels of internal nodes below and with *root*: all leaves are equally deep."""
    place = Subtree(root, ALL_KEYS)
    for height in range(MAX_BTREE_DEPTH):
        node = read_subtree(device, place, MAPPINGS)
        if node.is_leaf:
            return height
        place = subtrees(node, place.keys)[0]
    raise FormatError(root, "depth of the tree", want=f"at most {MAX_BTREE_DEPTH}", got="more")


def _pieces(
    device: BlockReader, left: _Side, right: _Side, *, include_same: bool
) -> Iterator[DeltaRun]:
    """Runs in ascending order that may still be split."""
    while left.place is not None or right.place is not None:
        shared = left.place
        if shared is not None and right.place is not None and shared.block == right.place.block:
            yield from _compare(left.take(_END), right.take(_END), include_same=include_same)
            left.skip()
            right.skip()
            if include_same:
                yield from _same_below(device, shared)
            continue
        first = left if left.order <= right.order else right
        first.expand()
        bound = min(side.place.keys.begin if side.place else _END for side in (left, right))
        yield from _compare(left.take(bound), right.take(bound), include_same=include_same)
    yield from _compare(left.take(_END), right.take(_END), include_same=include_same)


def _same_below(device: BlockReader, place: Subtree) -> Iterator[DeltaRun]:
    side = _Side(device, place.block)
    while side.place is not None:
        side.expand()
        for key in side.take(_END):
            yield DeltaRun(key, 1, DeltaKind.SAME)


def _compare(
    left: dict[int, int], right: dict[int, int], *, include_same: bool
) -> Iterator[DeltaRun]:
    for key in sorted(left.keys() | right.keys()):
        if key not in right:
            kind = DeltaKind.LEFT_ONLY
        elif key not in left:
            kind = DeltaKind.RIGHT_ONLY
        elif left[key] != right[key]:
            kind = DeltaKind.DIFFER
        elif include_same:
            kind = DeltaKind.SAME
        else:
            continue
        yield DeltaRun(key, 1, kind)
