"""B-trees of pool metadata, shadowed block by block.

The invariants are those of the kernel's `dm-btree.c` and `dm-btree-remove.c`: keys ascend; a
parent's key is not above the first key of its child; every node but the root is at least a third
full.  The way there differs: runs of sorted keys are merged into whole leaves at a time.

Each operation takes a root and gives back the root that replaces it.  Not thread-safe.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from devmapper.errors import FormatError
from devmapper.thin import format as layout
from devmapper.thin.node import U64, Node, Values, ValueType
from devmapper.thin.transaction_manager import Counter, TransactionManager

V = TypeVar("V", int, bytes)


class Inserted(NamedTuple):
    root: int
    added: int  # keys that were not there before


class Removed(NamedTuple):
    root: int
    removed: int


class Btree(Generic[V]):
    """The operations of one kind of tree; the tree itself is a root in somebody's keeping."""

    def __init__(
        self, tm: TransactionManager, value_type: ValueType, counter: Counter | None = None
    ) -> None:
        self._tm = tm
        self._value_type = value_type
        self._counter = counter

    def create(self) -> int:
        """Make an empty tree."""
        return self._tm.add(Node.empty(self._value_type, leaf=True)).block

    def lookup(self, root: int, key: int) -> V | None:
        read, value_type = self._tm.read, self._value_type
        node = read(root, value_type)
        for _ in range(layout.MAX_BTREE_DEPTH):
            if node.leaf:
                at = bisect_left(node.keys, key)
                if at < len(node.keys) and node.keys[at] == key:
                    value: V = node.values[at]
                    return value
                return None
            at = bisect_right(node.keys, key)
            if not at:
                return None
            node = read(node.values[at - 1], value_type)
        raise self._too_deep(node.block)

    def last_key(self, root: int) -> int | None:
        """The highest key; None for an empty tree."""
        node = self._tm.read(root, self._value_type)
        for _ in range(layout.MAX_BTREE_DEPTH):
            if node.leaf:
                return node.keys[-1] if node.keys else None
            node = self._tm.read(node.values[-1], self._value_type)
        raise self._too_deep(node.block)

    def leaves(
        self, root: int, begin: int = 0, end: int = layout.MAX_KEY
    ) -> Iterator[tuple["array[int]", Sequence[V]]]:
        """What is mapped from *begin* until before *end*: copies of keys and values, by leaf."""
        key = begin
        while key < end:
            node, upper = self._leaf_for(root, key)
            low, high = bisect_left(node.keys, key), bisect_left(node.keys, end)
            if low < high:
                yield node.keys[low:high], node.values[low:high]
            if upper is None:
                return
            if upper <= key:
                raise FormatError(node.block, "keys above it", want=f"above {key}", got=upper)
            key = upper

    def count_leaves(self, root: int, begin: int = 0, end: int = layout.MAX_KEY) -> int:
        """How many leaves may hold keys of the range; reads internal nodes and one leaf only."""
        return self._count_leaves(self._tm.read(root, self._value_type), begin, end, 0)

    def depth(self, root: int) -> int:
        """Levels from root to leaf; 1 for a tree of one leaf."""
        node = self._tm.read(root, self._value_type)
        for level in range(1, layout.MAX_BTREE_DEPTH + 1):
            if node.leaf:
                return level
            node = self._tm.read(node.values[0], self._value_type)
        raise self._too_deep(node.block)

    def own_path(self, root: int, key: int) -> int:
        """Shadow the nodes from the root to the leaf of *key*, so that its value is unshared."""
        node = top = self._own(root)
        for _ in range(layout.MAX_BTREE_DEPTH):
            if node.leaf:
                return top.block
            node = self._own_child(node, max(bisect_right(node.keys, key) - 1, 0))
        raise self._too_deep(node.block)

    def insert(self, root: int, key: int, value: V) -> Inserted:
        return self.insert_many(root, array("Q", (key,)), self._pack_values([value]))

    def insert_many(self, root: int, keys: Sequence[int], values: Sequence[V]) -> Inserted:
        """Insert *values* at ascending *keys*; a value that is replaced loses its reference."""
        if not keys:
            return Inserted(root, 0)
        node = self._own(root)
        wide_keys = keys if isinstance(keys, array) else array("Q", keys)
        added = self._merge(node, wide_keys, self._pack_values(values), 0)
        while len(node.keys) > node.limit:
            top = self._tm.add(Node.empty(U64, leaf=False))
            top.keys.append(node.keys[0])
            top.values.append(node.block)
            self._spread(top, 0, node)
            node = top
        return Inserted(node.block, added)

    def remove_range(self, root: int, begin: int, end: int) -> Removed:
        """Remove every key from *begin* until before *end*."""
        if next(self.leaves(root, begin, end), None) is None:
            return Removed(root, 0)
        node = self._own(root)
        removed = self._cut(node, begin, end, None, 0)
        if not node.leaf and not node.keys:
            self._tm.dec(node.block)
            return Removed(self.create(), removed)
        root = self._mend(node, begin).block
        behind = next(self.leaves(root, end), None)
        if behind is not None:  # the key, not *end*: parents' keys have moved up
            root = self._mend(self._own(root), behind[0][0]).block
        return Removed(root, removed)

    def delete(self, root: int) -> None:
        """Let go of the root and of everything that nobody else refers to."""
        self._drop(root, 0, counting=False)

    # Reading

    def _leaf_for(self, root: int, key: int) -> tuple[Node, int | None]:
        """The leaf where *key* belongs, and the lowest key that may stand behind that leaf."""
        upper = None
        node = self._tm.read(root, self._value_type)
        for _ in range(layout.MAX_BTREE_DEPTH):
            if node.leaf:
                return node, upper
            at = max(bisect_right(node.keys, key) - 1, 0)
            if at + 1 < len(node.keys):
                upper = node.keys[at + 1]
            node = self._tm.read(node.values[at], self._value_type)
        raise self._too_deep(node.block)

    def _count_leaves(self, node: Node, begin: int, end: int, depth: int) -> int:
        if node.leaf:
            return 1
        self._check_depth(node, depth)
        low = max(bisect_right(node.keys, begin) - 1, 0)
        high = max(bisect_left(node.keys, end), low + 1)
        first = self._tm.read(node.values[low], self._value_type)
        if first.leaf:
            return high - low
        read = self._tm.read
        return sum(
            self._count_leaves(read(child, self._value_type), begin, end, depth + 1)
            for child in node.values[low:high]
        )

    def _too_deep(self, block: int) -> FormatError:
        want = f"at most {layout.MAX_BTREE_DEPTH}"
        return FormatError(block, "depth of the tree above it", want=want, got="more")

    def _check_depth(self, node: Node, depth: int) -> None:
        if depth > layout.MAX_BTREE_DEPTH:
            raise self._too_deep(node.block)

    # Changing

    def _pack_values(self, values: Sequence[V]) -> Values:
        if isinstance(values, array):
            return values
        packed = self._value_type.unpack(b"")
        packed.extend(values)
        return packed

    def _own(self, block: int) -> Node:
        return self._tm.shadow(self._tm.read(block, self._value_type), self._counter)

    def _own_child(self, parent: Node, at: int) -> Node:
        child = self._own(parent.values[at])
        parent.values[at] = child.block
        return child

    def _merge(self, node: Node, keys: "array[int]", values: Values, depth: int) -> int:
        """Put the run below *node*, which is ours and may get over-full; return the keys added."""
        if node.leaf:
            return self._merge_leaf(node, keys, values)
        self._check_depth(node, depth)
        added = begin = 0
        while begin < len(keys):
            at = max(bisect_right(node.keys, keys[begin]) - 1, 0)
            end = len(keys)
            if at + 1 < len(node.keys):
                end = bisect_left(keys, node.keys[at + 1], begin)
            child = self._own_child(node, at)
            added += self._merge(child, keys[begin:end], values[begin:end], depth + 1)
            node.keys[at] = child.keys[0]
            if len(child.keys) > child.limit:
                self._spread(node, at, child)
            begin = end
        return added

    def _merge_leaf(self, node: Node, keys: "array[int]", values: Values) -> int:
        low = bisect_left(node.keys, keys[0])
        high = bisect_right(node.keys, keys[-1], low)
        old_keys, old_values = node.keys[low:high], node.values[low:high]
        if not old_keys:
            node.keys[low:low], node.values[low:low] = keys, values
            return len(keys)
        if old_keys == keys:
            node.values[low:high] = values
            if self._counter is not None:
                self._counter.replace(old_values, values)
            return len(keys) - len(old_keys)
        merged = dict(zip(old_keys, old_values, strict=True))
        fresh = dict(zip(keys, values, strict=True))
        replaced = [key for key in keys if key in merged]
        if replaced and self._counter is not None:
            self._counter.replace([merged[k] for k in replaced], [fresh[k] for k in replaced])
        merged.update(fresh)
        ordered = array("Q", sorted(merged))
        node.keys[low:high] = ordered
        node.values[low:high] = self._pack_values([merged[key] for key in ordered])
        return len(keys) - len(replaced)

    def _spread(self, parent: Node, at: int, child: Node) -> None:
        """Divide an over-full child; the pieces become its right siblings."""
        if at and self._tm.is_fresh(parent.values[at - 1]):
            self._shift_left(parent, at, child)
        sizes = _piece_sizes(len(child.keys), child.limit, appending=at + 1 == len(parent.keys))
        start = sizes[0]
        for offset, size in enumerate(sizes[1:], 1):
            piece = Node.empty(child.value_type, leaf=child.leaf)
            piece.limit = child.limit
            piece.keys = child.keys[start : start + size]
            piece.values = child.values[start : start + size]
            self._tm.add(piece)
            parent.keys.insert(at + offset, piece.keys[0])
            parent.values.insert(at + offset, piece.block)
            start += size
        del child.keys[sizes[0] :], child.values[sizes[0] :]

    def _shift_left(self, parent: Node, at: int, child: Node) -> None:
        """Move what fits to the left sibling, which keeps appended trees dense."""
        left = self._own_child(parent, at - 1)
        room = min(left.limit - len(left.keys), len(child.keys) - layout.min_entries(child.limit))
        if room <= 0:
            return
        left.keys += child.keys[:room]
        left.values += child.values[:room]
        del child.keys[:room], child.values[:room]
        parent.keys[at] = child.keys[0]

    def _cut(self, node: Node, begin: int, end: int, upper: int | None, depth: int) -> int:
        """Remove the range below *node*, which is ours and whose keys are all below *upper*.

        Afterwards nodes on the two edges of the range may hold too little, but not nothing.
        """
        if node.leaf:
            low, high = bisect_left(node.keys, begin), bisect_left(node.keys, end)
            if self._counter is not None and low < high:
                self._counter.dec(node.values[low:high])
            del node.keys[low:high], node.values[low:high]
            return high - low
        self._check_depth(node, depth)
        removed = 0
        keys = node.keys[:]
        low = max(bisect_right(keys, begin) - 1, 0)
        for at in reversed(range(low, bisect_left(keys, end))):
            below = keys[at + 1] if at + 1 < len(keys) else upper
            if keys[at] >= begin and below is not None and below <= end:
                removed += self._drop(node.values[at], depth + 1, counting=True)
                del node.keys[at], node.values[at]
                continue
            child = self._own_child(node, at)
            removed += self._cut(child, begin, end, below, depth + 1)
            if child.keys:
                node.keys[at] = child.keys[0]
            else:
                self._tm.dec(child.block)
                del node.keys[at], node.values[at]
        return removed

    def _drop(self, block: int, depth: int, *, counting: bool) -> int:
        """Let go of a subtree; return how many keys it has, if *counting*."""
        shared = self._tm.counts.count(block) > 1
        removed = 0
        if not shared or counting:
            removed = self._drop_entries(block, depth, shared=shared, counting=counting)
        self._tm.dec(block)
        return removed

    def _drop_entries(self, block: int, depth: int, *, shared: bool, counting: bool) -> int:
        node = self._tm.read(block, self._value_type)
        if node.leaf:
            if not shared and self._counter is not None:
                self._counter.dec(node.values)
            return len(node.keys)
        self._check_depth(node, depth)
        if shared:
            removed = 0
            for child in node.values:
                removed += self._drop_entries(child, depth + 1, shared=True, counting=counting)
                self._tm.forget(child)
            return removed
        return sum(self._drop(child, depth + 1, counting=counting) for child in node.values)

    def _mend(self, root: Node, key: int) -> Node:
        """Refill the nodes on the way to *key* that hold too little; return the new root."""
        node = root
        while not node.leaf:
            if node is root and len(node.keys) == 1:
                # The child's reference passes from the old root to the caller.
                child = node.values[0]
                self._tm.dec(node.block)
                node = root = self._own(child)
                continue
            at = max(bisect_right(node.keys, key) - 1, 0)
            child = self._tm.read(node.values[at], self._value_type)
            if len(child.keys) < layout.min_entries(child.limit):
                self._refill(node, at)
                node = root
            elif child.leaf:
                break
            else:
                node = self._own_child(node, at)
        return root

    def _refill(self, parent: Node, at: int) -> None:
        """Join a child with a sibling, or let it have some of the sibling's entries."""
        at = max(at - 1, 0)
        left, right = self._own_child(parent, at), self._own_child(parent, at + 1)
        keys, values = left.keys + right.keys, left.values + right.values
        if len(keys) <= 2 * layout.min_entries(min(left.limit, right.limit)):
            left.keys, left.values = keys, values
            self._tm.dec(right.block)
            del parent.keys[at + 1], parent.values[at + 1]
            return
        half = len(keys) // 2
        left.keys, left.values = keys[:half], values[:half]
        right.keys, right.values = keys[half:], values[half:]
        parent.keys[at + 1] = right.keys[0]


def _piece_sizes(total: int, limit: int, *, appending: bool) -> list[int]:
    """Sizes of the nodes that share *total* entries, none of them too empty."""
    pieces = -(-total // limit)
    if pieces == 1:
        return [total]
    if not appending:
        return [total * (n + 1) // pieces - total * n // pieces for n in range(pieces)]
    least = layout.min_entries(limit) + 1
    last = total - limit * (pieces - 1)
    if last >= least:
        return [limit] * (pieces - 1) + [last]
    return [limit] * (pieces - 2) + [limit - (least - last), least]
