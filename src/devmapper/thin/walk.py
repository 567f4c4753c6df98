"""Reading the trees of pool metadata that may be damaged: nodes, leaves, single keys.

Nothing here writes, caches or repairs, and nothing here shares code with the writing half of the
package, so that the readers can judge what that half has written.  What is damaged raises
`IntegrityError`; a block that the system cannot read stays `OSError`.  Random bytes and cyclic
trees end in one of these, never in an endless loop.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from operator import lt
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from devmapper.errors import FormatError, UsageError
from devmapper.thin.checksum import check_block
from devmapper.thin.format import (
    BLOCK_SECTORS,
    BTREE_NODE,
    DEVICE_DETAILS_SIZE,
    ENTRIES_PER_BITMAP,
    INCOMPAT_SUPPORTED,
    INDEX_ENTRY_SIZE,
    MAGIC,
    MAPPING_SIZE,
    MAX_BTREE_DEPTH,
    MAX_KEY,
    MAX_TIME,
    MIN_VERSION,
    REF_COUNT_SIZE,
    SUPERBLOCK,
    SUPERBLOCK_LOCATION,
    U64_SIZE,
    VERSION,
    BlockKind,
    DeviceDetails,
    NodeHeader,
    SpaceMapRoot,
    Superblock,
    min_entries,
    node_keys,
    node_values,
    unpack_u64s,
)
from devmapper.units import MAX_DATA_BLOCK_SIZE, MIN_DATA_BLOCK_SIZE

if TYPE_CHECKING:
    from array import array

_END_OF_KEYS: Final = MAX_KEY + 1
_TIME_BITS: Final = MAX_TIME.bit_length()


class BlockReader(Protocol):
    """The half of a metadata device that readers need."""

    @property
    def nr_blocks(self) -> int: ...
    def read(self, block: int) -> bytes: ...


class Tree(NamedTuple):
    """A kind of B-tree: its name in messages and the size of a value in its leaves."""

    name: str
    value_size: int


DEVICES: Final = Tree("top level of the mapping tree", U64_SIZE)
MAPPINGS: Final = Tree("mapping tree", MAPPING_SIZE)
DETAILS: Final = Tree("device details tree", DEVICE_DETAILS_SIZE)
INDEX: Final = Tree("index of the data space map", INDEX_ENTRY_SIZE)
DATA_REF_COUNTS: Final = Tree("ref count tree of the data space map", REF_COUNT_SIZE)
METADATA_REF_COUNTS: Final = Tree("ref count tree of the metadata space map", REF_COUNT_SIZE)


class KeyRange(NamedTuple):
    """Keys from *begin* up to, but without, *end*."""

    begin: int
    end: int

    def __str__(self) -> str:
        if self.end == _END_OF_KEYS:
            return "all keys" if self.begin == 0 else f"keys from {self.begin}"
        return f"keys {self.begin} to {self.end - 1}"


ALL_KEYS: Final = KeyRange(0, _END_OF_KEYS)


class Node(NamedTuple):
    """A node that passed every check that needs no other block."""

    block: int
    is_leaf: bool
    max_entries: int
    keys: "array[int]"
    values: bytes

    def u64_values(self) -> "array[int]":
        """The values as integers: children, subtree roots or packed mappings."""
        return unpack_u64s(self.values)

    def data_blocks(self) -> list[int]:
        """The data blocks that a leaf of a mapping tree maps to, in the order of its keys."""
        return [packed >> _TIME_BITS for packed in unpack_u64s(self.values)]

    @property
    def is_underfull(self) -> bool:
        """Less full than a node other than a root may be."""
        return len(self.keys) < min_entries(self.max_entries)


class Subtree(NamedTuple):
    """A place in a tree: the node there, and the keys that belong below it."""

    block: int
    keys: KeyRange


def read_block(device: BlockReader, block: int, kind: BlockKind) -> bytes:
    """Read the block of *kind* that a pointer leads to; the pointer may be wrong."""
    if not 0 <= block < device.nr_blocks:
        want = f"less than {device.nr_blocks}"
        raise FormatError(block, f"number of this {kind.name}", want=want, got=block)
    raw = device.read(block)
    check_block(raw, kind, block)
    return raw


def read_node(device: BlockReader, block: int, tree: Tree) -> Node:
    """Read a node and check all that can be checked in it alone."""
    raw = read_block(device, block, BTREE_NODE)
    header = NodeHeader.unpack(raw)
    header.check(block)
    value_size = tree.value_size if header.is_leaf else U64_SIZE
    if header.value_size != value_size:
        raise FormatError(block, "value_size", want=value_size, got=header.value_size)
    if header.max_entries % 3:
        raise FormatError(block, "max_entries", want="a multiple of 3", got=header.max_entries)
    if not header.is_leaf and not header.nr_entries:
        raise FormatError(block, "nr_entries of an internal node", want="at least 1", got=0)
    keys = node_keys(header, raw)
    if not all(map(lt, keys, keys[1:])):
        this, following = next(pair for pair in pairwise(keys) if pair[0] >= pair[1])
        raise FormatError(block, f"key behind {this}", want=f"above {this}", got=following)
    values = node_values(header, raw)
    return Node(block, header.is_leaf, header.max_entries, keys, values)


def check_key_range(block: int, first: int, last: int, keys: KeyRange) -> None:
    """Raise unless the keys of a node lie where its parent puts them."""
    if first < keys.begin:
        raise FormatError(block, "first key", want=f"at least {keys.begin}", got=first)
    if last >= keys.end:
        raise FormatError(block, "last key", want=f"less than {keys.end}", got=last)


def subtrees(node: Node, keys: KeyRange) -> list[Subtree]:
    """The children of an internal node, whose own keys are bounded by *keys*, in key order."""
    ends = [*node.keys[1:], keys.end]
    ranges = map(KeyRange, node.keys, ends)
    return list(map(Subtree, node.u64_values(), ranges))


def read_subtree(device: BlockReader, place: Subtree, tree: Tree) -> Node:
    """Read the node at a place of a tree and check that its keys belong there."""
    node = read_node(device, place.block, tree)
    if node.keys:
        check_key_range(place.block, node.keys[0], node.keys[-1], place.keys)
    return node


def leaves(device: BlockReader, root: int, tree: Tree) -> Iterator[Node]:
    """The leaves of one tree in key order."""
    pending = [Subtree(root, ALL_KEYS)]
    seen: set[int] = set()
    while pending:
        place = pending.pop()
        if place.block in seen:
            raise reached_twice(place.block, tree)
        seen.add(place.block)
        node = read_subtree(device, place, tree)
        if node.is_leaf:
            yield node
        else:
            pending.extend(reversed(subtrees(node, place.keys)))


def reached_twice(block: int, tree: Tree) -> FormatError:
    """The error for a node that stands at two places of one tree, or below itself."""
    return FormatError(block, f"place in the {tree.name}", want="one", got="more than one")


def lookup(device: BlockReader, root: int, key: int, tree: Tree) -> bytes | None:
    """The value of *key*, or None; reads one node of each level."""
    place = Subtree(root, ALL_KEYS)
    for _ in range(MAX_BTREE_DEPTH):
        node = read_subtree(device, place, tree)
        at = bisect_right(node.keys, key) - 1
        if at < 0:
            return None
        if node.is_leaf:
            size = tree.value_size
            return node.values[at * size : (at + 1) * size] if node.keys[at] == key else None
        place = subtrees(node, place.keys)[at]
    raise FormatError(root, "depth of the tree", want=f"at most {MAX_BTREE_DEPTH}", got="more")


def highest_key(device: BlockReader, root: int, tree: Tree) -> int | None:
    """The last key of a tree, None where it is empty; reads one node of each level."""
    place = Subtree(root, ALL_KEYS)
    for _ in range(MAX_BTREE_DEPTH):
        node = read_subtree(device, place, tree)
        if node.is_leaf:
            return node.keys[-1] if node.keys else None
        place = subtrees(node, place.keys)[-1]
    raise FormatError(root, "depth of the tree", want=f"at most {MAX_BTREE_DEPTH}", got="more")


def read_superblock(device: BlockReader, block: int = SUPERBLOCK_LOCATION) -> Superblock:
    """Read the superblock, or the copy of it that a metadata snap is, and check its fields."""
    superblock = Superblock.unpack(read_block(device, block, SUPERBLOCK))
    if superblock.magic != MAGIC:
        raise FormatError(block, "magic", want=MAGIC, got=superblock.magic)
    if not MIN_VERSION <= superblock.version <= VERSION:
        want = f"{MIN_VERSION} to {VERSION}"
        raise FormatError(block, "version", want=want, got=superblock.version)
    if unknown := superblock.incompat_flags & ~INCOMPAT_SUPPORTED:
        raise FormatError(block, "incompat_flags", want="none that is unknown", got=hex(unknown))
    if superblock.metadata_block_size != BLOCK_SECTORS:
        got = superblock.metadata_block_size
        raise FormatError(block, "metadata_block_size", want=f"{BLOCK_SECTORS} sectors", got=got)
    size = superblock.block_size
    if not MIN_DATA_BLOCK_SIZE <= size <= MAX_DATA_BLOCK_SIZE or size % MIN_DATA_BLOCK_SIZE:
        want = "64 KiB to 1 GiB in multiples of 64 KiB"
        raise FormatError(block, "data_block_size", want=want, got=f"{size} bytes")
    return superblock


def open_superblock(device: BlockReader, *, metadata_snap: bool) -> Superblock:
    """The superblock, or the one that the held root leads to; `UsageError` where none is held."""
    superblock = read_superblock(device)
    if not metadata_snap:
        return superblock
    if superblock.held_root == SUPERBLOCK_LOCATION:
        raise UsageError(
            "the pool holds no metadata snap",
            hint="send the pool the message reserve_metadata_snap first",
        )
    return read_superblock(device, superblock.held_root)


def nr_data_blocks(device: BlockReader, superblock: Superblock) -> int:
    """How many data blocks the pool has, checked against what so much metadata can count."""
    nr_blocks = SpaceMapRoot.unpack(superblock.data_space_map_root).nr_blocks
    limit = device.nr_blocks * ENTRIES_PER_BITMAP  # each bitmap is a metadata block
    if nr_blocks > limit:
        field = "nr_blocks of the data space map"
        raise FormatError(superblock.blocknr, field, want=f"at most {limit}", got=nr_blocks)
    return nr_blocks


def read_details(device: BlockReader, superblock: Superblock) -> dict[int, DeviceDetails]:
    """The details of every thin device by thin id, ascending."""
    details = {}
    for leaf in leaves(device, superblock.device_details_root, DETAILS):
        for at, thin_id in enumerate(leaf.keys):
            value = leaf.values[at * DEVICE_DETAILS_SIZE : (at + 1) * DEVICE_DETAILS_SIZE]
            details[thin_id] = DeviceDetails.unpack(value)
    return details


def read_mapping_roots(device: BlockReader, superblock: Superblock) -> dict[int, int]:
    """The root of every thin device's mappings by thin id, ascending."""
    roots: dict[int, int] = {}
    for leaf in leaves(device, superblock.data_mapping_root, DEVICES):
        roots.update(zip(leaf.keys, leaf.u64_values(), strict=True))
    return roots
