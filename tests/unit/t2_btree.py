"""Trees against a dict, whatever the order and the size of the runs."""

import random
from array import array
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devmapper.errors import ChecksumError, FormatError
from devmapper.thin import format as layout
from devmapper.thin.blocks import MemoryDevice
from devmapper.thin.btree import Btree
from devmapper.thin.node import U64, Node
from devmapper.thin.space_map import MetadataSpaceMap
from devmapper.thin.transaction_manager import TransactionManager


class Values:
    """Counts references to the values of a tree."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def inc(self, values: Iterable[int]) -> None:
        for value in values:
            self.counts[value] = self.counts.get(value, 0) + 1

    def dec(self, values: Iterable[int]) -> None:
        for value in values:
            self.counts[value] -= 1
            assert self.counts[value] >= 0

    def replace(self, old: Iterable[int], new: Iterable[int]) -> None:
        self.dec([was for was, now in zip(old, new, strict=True) if was != now])


class Tree:
    """A tree with a root of its own."""

    def __init__(self, nr_blocks: int = 3000) -> None:
        self.tm = TransactionManager(MemoryDevice(nr_blocks))
        self.space_map = MetadataSpaceMap.create(self.tm, nr_blocks)
        self.values = Values()
        self.btree = Btree[int](self.tm, U64, self.values)
        self.nr_before = self.space_map.nr_allocated
        self.root = self.btree.create()

    def insert(self, items: dict[int, int]) -> int:
        keys = sorted(items)
        self.values.inc(items.values())
        done = self.btree.insert_many(self.root, keys, [items[key] for key in keys])
        self.root = done.root
        return done.added

    def remove(self, begin: int, end: int) -> int:
        done = self.btree.remove_range(self.root, begin, end)
        self.root = done.root
        return done.removed

    def items(self, begin: int = 0, end: int = layout.MAX_KEY) -> dict[int, int]:
        found: dict[int, int] = {}
        for keys, values in self.btree.leaves(self.root, begin, end):
            found.update(zip(keys, values, strict=True))
        return found

    def check(self) -> int:
        """Every rule for the shape of a tree; return the number of its nodes."""
        nodes = []

        def below(block: int, low: int, high: int, *, top: bool) -> int:
            node = self.tm.read(block, U64)
            nodes.append(block)
            assert len(node.keys) == len(node.values) <= node.limit
            assert top or len(node.keys) >= node.limit // 3
            assert list(node.keys) == sorted(set(node.keys))
            assert all(low <= key < high for key in node.keys)
            if node.leaf:
                return 1
            assert not top or len(node.keys) > 1
            edges = [*node.keys, high]
            depths = {
                below(child, edges[at], edges[at + 1], top=False)
                for at, child in enumerate(node.values)
            }
            assert len(depths) == 1
            return 1 + depths.pop()

        assert below(self.root, 0, layout.MAX_KEY + 1, top=True) == self.btree.depth(self.root)
        assert self.space_map.nr_allocated - self.nr_before == len(nodes)
        return len(nodes)


runs = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 5000),
        st.sampled_from([1, 2, 100, 253, 1000, 4000]),
        st.sampled_from([1, 3, 64]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(runs)
def test_a_tree_equals_a_dict(steps):
    tree, value = Tree(), 0
    model: dict[int, int] = {}
    for insert, begin, length, stride in steps:
        if insert:
            items = {begin + n * stride: value + n for n in range(length)}
            value += length
            assert tree.insert(items) == len(items.keys() - model.keys())
            model.update(items)
        else:
            gone = {key for key in model if begin <= key < begin + length * stride}
            assert tree.remove(begin, begin + length * stride) == len(gone)
            for key in gone:
                del model[key]
        tree.check()
    assert tree.items() == model
    assert {v for v, count in tree.values.counts.items() if count} == set(model.values())
    assert tree.btree.last_key(tree.root) == max(model, default=None)
    for key in (0, 1, 77, 5000, *list(model)[:20]):
        assert tree.btree.lookup(tree.root, key) == model.get(key)
    tree.btree.delete(tree.root)
    assert tree.space_map.nr_allocated == tree.nr_before
    assert not any(tree.values.counts.values())


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_single_keys_in_any_order(order):
    keys = list(range(0, 9000, 3))
    if order == "descending":
        keys.reverse()
    elif order == "random":
        random.Random(4).shuffle(keys)
    tree = Tree()
    for key in keys:
        tree.insert({key: key})
    nodes = tree.check()
    assert tree.items() == {key: key for key in keys}
    if order == "ascending":
        assert nodes < len(keys) / 252 * 1.2  # appending leaves full nodes behind


def test_a_tree_of_three_levels_shrinks_to_one_leaf() -> None:
    tree = Tree()
    tree.insert({key: key for key in range(100_000)})
    assert tree.btree.depth(tree.root) == 3
    tree.check()
    rng = random.Random(9)
    left = set(range(100_000))
    while len(left) > 100:
        begin = rng.choice(sorted(left))
        end = begin + rng.choice([1, 50, 500, 30_000])
        gone = {key for key in left if begin <= key < end}
        assert tree.remove(begin, end) == len(gone)
        left -= gone
        tree.check()
        assert tree.items().keys() == left
    assert tree.btree.depth(tree.root) == 1


def test_a_range_is_read_by_its_borders() -> None:
    tree = Tree()
    tree.insert({key: key for key in range(0, 3000, 2)})
    assert sorted(tree.items(501, 1001)) == list(range(502, 1001, 2))
    assert tree.items(5000) == {}
    assert tree.items(7, 7) == {}
    assert tree.items(1, 2) == {}


def test_two_trees_that_share_nodes_do_not_see_each_other() -> None:
    tree = Tree()
    tree.insert({key: key for key in range(3000)})
    snapshot = tree.root
    tree.space_map.inc(snapshot)
    tree.insert({key: 10_000 + key for key in range(1000, 1010)})
    tree.remove(2000, 2500)
    now, tree.root = tree.root, snapshot
    assert tree.items() == {key: key for key in range(3000)}
    assert tree.values.counts[1005] == 1
    assert tree.values.counts[900] in (1, 2)  # by whether its leaf was unshared
    tree.btree.delete(snapshot)
    tree.root = now
    assert len(tree.items()) == 2500
    tree.check()
    assert tree.values.counts[1005] == 0
    assert tree.values.counts[900] == 1


def test_nothing_is_shadowed_to_remove_nothing() -> None:
    tree = Tree()
    tree.insert({key: key for key in range(1000)})
    allocated, root = tree.space_map.nr_allocated, tree.root
    assert tree.remove(2000, 9000) == 0
    assert (tree.space_map.nr_allocated, tree.root) == (allocated, root)


def damaged_tree(entries: dict[int, int], **header: int) -> Tree:
    tree = Tree()
    tree.insert(entries)
    tree.tm.write_back()
    raw = tree.tm.read_block(tree.root)
    fields = layout.NodeHeader.unpack(raw)._replace(**header)
    packed = fields.pack() + raw[layout.NODE_HEADER_SIZE :]
    tree.tm.write_block(tree.root, layout.BTREE_NODE, packed)
    return tree


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"flags": 0}, "flags"),
        ({"flags": 3}, "flags"),
        ({"nr_entries": 253}, "nr_entries"),
        ({"max_entries": 255}, "max_entries"),
        ({"max_entries": 0}, "max_entries"),
        ({"value_size": 4}, "value_size"),
        ({"value_size": 0xFFFFFFFF}, "max_entries"),
        ({"flags": 1, "nr_entries": 0}, "nr_entries"),
        ({"blocknr": 7777}, "blocknr"),
        ({"flags": 1}, "reference|number"),  # the values are no block numbers
    ],
)
def test_a_node_with_a_wrong_field_names_itself(header, field):
    tree = damaged_tree(dict.fromkeys(range(10), 10**9), **header)
    for read in (
        lambda: tree.btree.lookup(tree.root, 5),
        tree.items,
        lambda: tree.insert({4: 4}),
        lambda: tree.remove(4, 5),
        lambda: tree.btree.delete(tree.root),
    ):
        with pytest.raises(FormatError, match=field) as caught:
            read()
        assert caught.value.block in (tree.root, 10**9)


def test_a_tree_that_leads_back_into_itself_is_a_format_error() -> None:
    tree = Tree()
    node = Node.empty(U64, leaf=False)
    tree.tm.add(node)
    node.keys, node.values = array("Q", (0, 9)), array("Q", (node.block, node.block))
    for read in (
        lambda: tree.btree.lookup(node.block, 5),
        lambda: list(tree.btree.leaves(node.block)),
        lambda: tree.btree.insert(node.block, 5, 5),
        lambda: tree.btree.last_key(node.block),
        lambda: tree.btree.count_leaves(node.block),
    ):
        with pytest.raises(FormatError, match="depth"):
            read()


def test_a_flipped_bit_in_a_node_is_found_when_it_is_read() -> None:
    tree = Tree()
    tree.insert({1: 1})
    tree.tm.write_back()
    raw = bytearray(tree.tm.read_block(tree.root))
    raw[2000] ^= 1
    tree.tm.device.write(tree.root, bytes(raw))
    tree.tm.forget(tree.root)
    with pytest.raises(ChecksumError, match=f"metadata block {tree.root} "):
        tree.items()
