"""Shadowing: every change of a transaction goes to blocks that the last commit does not use.

The counterpart of `dm-transaction-manager.c` with its block cache.  What is on disk stays a whole
pool at every moment: new blocks may be written early, the superblock is written last.

Clean and changed nodes live in one cache.  It is cut back to its limit by `trim` only, which the
owner calls between operations, so that an operation may hold on to the nodes it has read.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, Protocol

from devmapper.errors import FormatError
from devmapper.thin import checksum
from devmapper.thin import format as layout
from devmapper.thin.blocks import MetadataDevice
from devmapper.thin.node import Node, Values, ValueType

DEFAULT_CACHE_BLOCKS: Final = 4096  # 16 MiB of metadata


class MetadataCounts(Protocol):
    """What the transaction manager asks of the metadata space map."""

    @property
    def nr_blocks(self) -> int: ...
    def allocate(self) -> int: ...
    def count(self, block: int) -> int: ...
    def inc(self, block: int) -> None: ...
    def inc_many(self, blocks: Iterable[int]) -> None: ...
    def dec(self, block: int) -> int:
        """Return the count that is left."""


class Counter(Protocol):
    """Reference counts behind the values of a tree's leaves (`struct dm_btree_value_type`)."""

    def inc(self, values: Values) -> None: ...
    def dec(self, values: Values) -> None: ...
    def replace(self, old: Values, new: Values) -> None:
        """Values *old* make place for *new*: let go of those that differ."""


class TransactionManager:
    """Nodes of the trees of one pool; not thread-safe."""

    def __init__(self, device: MetadataDevice, *, cache_blocks: int = DEFAULT_CACHE_BLOCKS) -> None:
        self.device = device
        self._cache_blocks = cache_blocks
        self._cache: OrderedDict[int, Node] = OrderedDict()
        self._dirty: set[int] = set()
        self._fresh: set[int] = set()
        self._counts: MetadataCounts | None = None

    def attach(self, counts: MetadataCounts) -> None:
        """Say which space map owns the blocks: it is built on top of this object."""
        self._counts = counts

    @property
    def counts(self) -> MetadataCounts:
        if self._counts is None:
            raise RuntimeError("no metadata space map attached")
        return self._counts

    def is_fresh(self, block: int) -> bool:
        """Was *block* allocated since the last commit, so that it may be written to?"""
        return block in self._fresh

    def read(self, block: int, value_type: ValueType) -> Node:
        """The node at *block* of a tree whose leaves have *value_type*; not to be changed."""
        node = self._cache.get(block)
        if node is None:
            node = Node.unpack(self.read_block(block), block, value_type)
            self._cache[block] = node
        else:
            self._cache.move_to_end(block)
            if node.leaf and node.value_type is not value_type:
                got = node.value_type.size
                raise FormatError(block, "value_size", want=value_type.size, got=got)
        return node

    def read_block(self, block: int) -> bytes:
        """A block that some other block refers to; one outside of the device is a `FormatError`."""
        nr_blocks = self.counts.nr_blocks
        if not 0 < block < nr_blocks:
            raise FormatError(block, "reference to it", want=f"1 to {nr_blocks - 1}", got=block)
        return self.device.read(block)

    def write_block(self, block: int, kind: layout.BlockKind, raw: bytes) -> None:
        """Seal and write a fresh block that is not a node."""
        self._cache.pop(block, None)
        self.device.write(block, checksum.seal(raw, kind))

    def allocate(self) -> int:
        block = self.counts.allocate()
        self._cache.pop(block, None)
        self._fresh.add(block)
        return block

    def shadow_block(self, block: int) -> int:
        """Where to write the next version of a block that is not a node and has one reference."""
        if block in self._fresh:
            return block
        new = self.allocate()
        if block:  # 0: it has never been written
            self.dec(block)
        return new

    def add(self, node: Node) -> Node:
        """Give a new node its block."""
        node.block = self.allocate()
        self._cache[node.block] = node
        self._dirty.add(node.block)
        return node

    def shadow(self, node: Node, counter: Counter | None) -> Node:
        """The node to change in place of *node*, whose reference passes to the result."""
        block = node.block
        counts = self.counts
        shared = counts.count(block) > 1
        if not shared and block in self._fresh:
            self._cache[block] = node
            self._dirty.add(block)
            return node
        if not shared:  # nobody else needs the old version: the object itself moves
            new = self.allocate()
            self.dec(block)
            node.block = new
            self._cache[new] = node
            self._dirty.add(new)
            return node
        copy = self.add(node.copy())
        counts.dec(block)
        if not node.leaf:
            counts.inc_many(node.values)
        elif counter is not None:
            counter.inc(node.values)
        return copy

    def dec(self, block: int) -> None:
        """Let go of one reference; what stood in the block is not touched otherwise."""
        if self.counts.dec(block) == 0:
            self._cache.pop(block, None)
            self._dirty.discard(block)
            self._fresh.discard(block)

    def forget(self, block: int) -> None:
        """Drop an unchanged node that is not going to be read again soon."""
        if block not in self._dirty:
            self._cache.pop(block, None)

    def trim(self) -> None:
        """Cut the cache back to its limit; changed nodes are written to their fresh blocks."""
        excess = len(self._cache) - self._cache_blocks
        for _ in range(excess):
            block, node = self._cache.popitem(last=False)
            if block in self._dirty:
                self._dirty.remove(block)
                self.device.write(block, node.pack())

    def write_back(self) -> None:
        """Write every changed node and wait until all blocks of the transaction are durable."""
        for block in sorted(self._dirty):
            self.device.write(block, self._cache[block].pack())
        self._dirty.clear()
        self.device.flush()

    def committed(self) -> None:
        """The superblock is durable: nothing is fresh any more."""
        self._fresh.clear()

    def abort(self) -> None:
        """Forget every block of the transaction."""
        for block in self._fresh:
            self._cache.pop(block, None)
        self._fresh.clear()
        self._dirty.clear()
