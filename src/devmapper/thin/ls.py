"""What each thin device uses: mapped, exclusive and shared data blocks, as `thin_ls` counts them.

A data block is exclusive to a thin device when nothing else in the pool maps it.  Snapshots share
nodes of their trees; how often a node is reached needs to be known only up to "more than once", so
each one is read at most three times however many snapshots lead to it.
"""

from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from devmapper.errors import FormatError
from devmapper.thin.walk import (
    ALL_KEYS,
    MAPPINGS,
    BlockReader,
    Node,
    Subtree,
    highest_key,
    nr_data_blocks,
    open_superblock,
    reached_twice,
    read_details,
    read_mapping_roots,
    read_subtree,
    read_superblock,
    subtrees,
)
from devmapper.units import ThinId, TransactionId

_OFTEN: Final = 2  # counts stop here


class ThinUsage(NamedTuple):
    """One thin device; block counts are in data blocks."""

    thin_id: ThinId
    mapped_blocks: int
    exclusive_blocks: int
    shared_blocks: int
    transaction_id: TransactionId
    creation_time: int
    snapshotted_time: int
    highest_mapped_block: int | None


def ls(device: BlockReader, *, metadata_snap: bool = False) -> list[ThinUsage]:
    """List every thin device by ascending id; damaged metadata raises `IntegrityError`."""
    superblock = open_superblock(device, metadata_snap=metadata_snap)
    details = read_details(device, superblock)
    roots = read_mapping_roots(device, superblock)
    if details.keys() != roots.keys():
        lost = min(details.keys() ^ roots.keys())
        where = superblock.device_details_root if lost in roots else superblock.data_mapping_root
        raise FormatError(where, f"entry of thin id {lost}", want="present", got="absent")
    sharing = _Sharing(device)
    for root in roots.values():
        sharing.add(root)
    usage = []
    for thin_id, detail in details.items():
        root = roots[thin_id]
        exclusive = sharing.count_exclusive(root)
        usage.append(
            ThinUsage(
                thin_id=ThinId(thin_id),
                mapped_blocks=detail.mapped_blocks,
                exclusive_blocks=exclusive,
                shared_blocks=detail.mapped_blocks - exclusive,
                transaction_id=detail.transaction_id,
                creation_time=detail.creation_time,
                snapshotted_time=detail.snapshotted_time,
                highest_mapped_block=highest_key(device, root, MAPPINGS),
            )
        )
    return usage


class _Sharing:
    """How many thin devices reach each node and each data block: none, one, or more."""

    def __init__(self, device: BlockReader) -> None:
        self._device = device
        self._nodes = bytearray(device.nr_blocks)
        self._last_tree = array("I", bytes(4 * device.nr_blocks))
        self._trees = 0
        self._data_blocks = bytearray(nr_data_blocks(device, read_superblock(device)))

    def add(self, root: int) -> None:
        """Count what the tree below *root* reaches."""
        self._trees += 1
        for leaf in self._leaves(root):
            self._count_leaf(leaf)

    def _leaves(self, root: int) -> Iterator[Node]:
        pending = [Subtree(root, ALL_KEYS)]
        while pending:
            place = pending.pop()
            if place.block < len(self._nodes):
                if self._nodes[place.block] == _OFTEN:
                    continue
                if self._last_tree[place.block] == self._trees:
                    raise reached_twice(place.block, MAPPINGS)
                self._last_tree[place.block] = self._trees
                self._nodes[place.block] += 1
            node = read_subtree(self._device, place, MAPPINGS)
            if node.is_leaf:
                yield node
            else:
                pending.extend(reversed(subtrees(node, place.keys)))

    def _count_leaf(self, leaf: Node) -> None:
        counts = self._data_blocks
        blocks = leaf.data_blocks()
        if blocks and max(blocks) >= len(counts):
            want = f"less than {len(counts)}"
            raise FormatError(leaf.block, "data block of a mapping", want=want, got=max(blocks))
        for block in blocks:
            if counts[block] < _OFTEN:
                counts[block] += 1

    def count_exclusive(self, root: int) -> int:
        """Count the data blocks below *root* that were reached once."""
        exclusive = 0
        pending = [Subtree(root, ALL_KEYS)]
        while pending:
            place = pending.pop()
            if self._nodes[place.block] == _OFTEN:
                continue  # every data block below it is shared, too
            node = read_subtree(self._device, place, MAPPINGS)
            if node.is_leaf:
                counts = self._data_blocks
                exclusive += sum(counts[block] == 1 for block in node.data_blocks())
            else:
                pending.extend(subtrees(node, place.keys))
        return exclusive
