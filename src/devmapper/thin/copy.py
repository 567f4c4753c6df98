"""A pool's metadata in another place: its trees block by block, its space maps made anew.

For trees that are pinned (by a metadata snap) while the pool goes on: the space maps on disk are
those of a later commit by then, so what is referred to is counted here.
"""

from array import array
from collections.abc import Iterator

from devmapper.errors import FormatError
from devmapper.thin import checksum
from devmapper.thin import format as layout
from devmapper.thin.blocks import MetadataDevice
from devmapper.thin.format import SpaceMapRoot, Superblock
from devmapper.thin.space_map import DataSpaceMap, MetadataSpaceMap
from devmapper.thin.transaction_manager import TransactionManager
from devmapper.thin.walk import (
    ALL_KEYS,
    DETAILS,
    DEVICES,
    MAPPINGS,
    BlockReader,
    Node,
    Subtree,
    Tree,
    nr_data_blocks,
    read_node,
    read_subtree,
    read_superblock,
    subtrees,
)

_OVERFLOW_BATCH = 4096


def copy_pool(source: BlockReader, trees: Superblock, target: MetadataDevice) -> None:
    """Make *target*, which holds nothing but zeros, a pool with the trees of *trees*; durably.

    *trees* is the superblock of *source* or its metadata snap.  Nodes keep their numbers and what
    they share.  Memory: four bytes for each metadata block, and what a space map takes.
    """
    now = read_superblock(source)
    metadata_blocks = SpaceMapRoot.unpack(now.metadata_space_map_root).nr_blocks
    if metadata_blocks > target.nr_blocks:
        field = "nr_blocks of the metadata space map"
        raise FormatError(
            now.blocknr, field, want=f"at most {target.nr_blocks}", got=metadata_blocks
        )
    nodes = _Nodes(source, target)
    nodes.copy(trees)
    tm = TransactionManager(target)
    metadata = MetadataSpaceMap.create(tm, metadata_blocks, nodes.references())
    data = DataSpaceMap.create(tm, nr_data_blocks(source, now))
    for leaf in nodes.mapping_leaves:
        data.inc_many(read_node(target, leaf, MAPPINGS).data_blocks())
        if data.nr_overflow_changes > _OVERFLOW_BATCH:
            data.flush_overflow()
        data.trim()
        tm.trim()
    data_root = data.flush()
    metadata_root = metadata.flush()
    tm.write_back()
    superblock = trees._replace(
        flags=now.flags,
        blocknr=layout.SUPERBLOCK_LOCATION,
        held_root=0,
        data_space_map_root=data_root.pack(),
        metadata_space_map_root=metadata_root.pack(),
        metadata_nr_blocks=metadata_blocks,
    )
    raw = checksum.seal(superblock.pack(), layout.SUPERBLOCK)
    target.write(layout.SUPERBLOCK_LOCATION, raw)
    target.flush()


class _Nodes:
    """Copies every node once and counts who refers to it."""

    def __init__(self, source: BlockReader, target: MetadataDevice) -> None:
        self._source = _Remembering(source)
        self._target = target
        self._counts = array("I", bytes(4 * source.nr_blocks))
        self.mapping_leaves = array("Q")

    def copy(self, trees: Superblock) -> None:
        """Copy the three kinds of trees."""
        for _ in self._leaves(trees.device_details_root, DETAILS):
            pass
        for devices in self._leaves(trees.data_mapping_root, DEVICES):
            for root in devices.u64_values():
                for leaf in self._leaves(root, MAPPINGS):
                    self.mapping_leaves.append(leaf.block)

    def references(self) -> Iterator[int]:
        """Every block in use, as often as it is referred to."""
        for block, count in enumerate(self._counts):
            for _ in range(count):
                yield block

    def _leaves(self, root: int, tree: Tree) -> Iterator[Node]:
        """The leaves that were not reached before."""
        pending = [Subtree(root, ALL_KEYS)]
        while pending:
            place = pending.pop()
            if place.block < len(self._counts) and self._counts[place.block]:
                self._counts[place.block] += 1
                continue
            node = read_subtree(self._source, place, tree)
            self._counts[place.block] = 1
            self._target.write(place.block, self._source.last)
            if node.is_leaf:
                yield node
            else:
                pending.extend(subtrees(node, place.keys))


class _Remembering:
    """Keeps the block that was read last, which the walk gives back taken apart."""

    def __init__(self, source: BlockReader) -> None:
        self._source = source
        self.last = b""

    @property
    def nr_blocks(self) -> int:
        return self._source.nr_blocks

    def read(self, block: int) -> bytes:
        self.last = self._source.read(block)
        return self.last
