"""An independent look at committed pool metadata: counts must equal what can be reached.

Uses the declarations of `thin.format` and nothing of the code under test.
"""

from collections import Counter
from collections.abc import Callable

from devmapper.thin import checksum
from devmapper.thin import format as layout
from devmapper.thin.blocks import MetadataDevice
from devmapper.thin.format import IndexEntry, NodeHeader, SpaceMapRoot, Superblock

Entries = list[tuple[int, bytes]]


class Audit:
    """Walks everything that the superblock refers to, then compares; raises AssertionError.

    `contents` is thin id: block: data block; `details` is thin id: details.
    """

    def __init__(self, device: MetadataDevice) -> None:
        self._device = device
        self._seen: dict[int, Entries] = {}
        self._metadata = Counter({layout.SUPERBLOCK_LOCATION: 1})
        self._data: Counter[int] = Counter()
        superblock = Superblock.unpack(self._read(layout.SUPERBLOCK_LOCATION, layout.SUPERBLOCK))
        self.contents = self._devices(superblock)
        self.details = {
            thin_id: layout.DeviceDetails.unpack(raw)
            for thin_id, raw in self._tree(superblock.device_details_root, 24)
        }
        if superblock.held_root:
            self._metadata[superblock.held_root] += 1
            held = Superblock.unpack(self._read(superblock.held_root, layout.SUPERBLOCK))
            self._devices(held)
            self._tree(held.device_details_root, 24)
        self._check_details()
        self._check_space_maps(superblock)

    def _read(self, block: int, kind: layout.BlockKind) -> bytes:
        raw = self._device.read(block)
        checksum.check_block(raw, kind, block)
        return raw

    def _tree(
        self,
        block: int,
        size: int,
        on_value: Callable[[bytes], object] = lambda _: None,
        *,
        top: bool = True,
    ) -> Entries:
        """Count one reference to the tree; what is below a node is counted once per node."""
        self._metadata[block] += 1
        if block in self._seen:
            return self._seen[block]
        raw = self._read(block, layout.BTREE_NODE)
        header = NodeHeader.unpack(raw)
        header.check(block)
        keys = list(layout.node_keys(header, raw))
        values = layout.node_values(header, raw)
        assert keys == sorted(set(keys)), f"keys of block {block}"
        assert top or len(keys) >= header.max_entries // 3, f"block {block}: {len(keys)} entries"
        entries: Entries = []
        if header.is_leaf:
            assert header.value_size == size
            entries = [(key, values[at * size : at * size + size]) for at, key in enumerate(keys)]
            for _, value in entries:
                on_value(value)
        else:
            assert not top or len(keys) > 1, f"root {block} has one child"
            for at, child in enumerate(layout.unpack_u64s(values)):
                below = self._tree(child, size, on_value, top=False)
                assert keys[at] <= below[0][0]
                assert not entries or entries[-1][0] < keys[at]
                entries += below
        self._seen[block] = entries
        return entries

    def _devices(self, superblock: Superblock) -> dict[int, dict[int, int]]:
        def count_data(raw: bytes) -> None:
            self._data[layout.unpack_mapping(int.from_bytes(raw, "little")).data_block] += 1

        def walk_mappings(raw: bytes) -> None:
            self._tree(int.from_bytes(raw, "little"), 8, count_data)

        return {
            thin_id: {
                block: layout.unpack_mapping(int.from_bytes(packed, "little")).data_block
                for block, packed in self._seen[int.from_bytes(root, "little")]
            }
            for thin_id, root in self._tree(superblock.data_mapping_root, 8, walk_mappings)
        }

    def _check_details(self) -> None:
        assert self.details.keys() == self.contents.keys()
        for thin_id, blocks in self.contents.items():
            assert self.details[thin_id].mapped_blocks == len(blocks)

    def _check_space_maps(self, superblock: Superblock) -> None:
        data = SpaceMapRoot.unpack(superblock.data_space_map_root)
        metadata = SpaceMapRoot.unpack(superblock.metadata_space_map_root)
        data_index = [IndexEntry.unpack(raw) for _, raw in self._tree(data.bitmap_root, 16)]
        data_large = dict(self._tree(data.ref_count_root, 4))
        metadata_large = dict(self._tree(metadata.ref_count_root, 4))
        self._metadata[metadata.bitmap_root] += 1
        raw = self._read(metadata.bitmap_root, layout.METADATA_INDEX)
        nr_bitmaps = -(-metadata.nr_blocks // layout.ENTRIES_PER_BITMAP)
        metadata_index = list(layout.MetadataIndex.unpack(raw).entries[:nr_bitmaps])
        self._metadata.update(entry.blocknr for entry in (*data_index, *metadata_index))
        self._compare(data, data_index, data_large, self._data)
        self._compare(metadata, metadata_index, metadata_large, self._metadata)

    def _compare(
        self,
        root: SpaceMapRoot,
        index: list[IndexEntry],
        large: dict[int, bytes],
        reached: Counter[int],
    ) -> None:
        stored = {}
        for at, entry in enumerate(index):
            counts = layout.unpack_bitmap(self._read(entry.blocknr, layout.BITMAP))
            used = {n: count for n, count in enumerate(counts) if count}
            assert entry.nr_free == layout.ENTRIES_PER_BITMAP - len(used)
            assert all(n in used for n in range(entry.none_free_before))
            for n, count in used.items():
                block = at * layout.ENTRIES_PER_BITMAP + n
                stored[block] = int.from_bytes(large.pop(block), "little") if count == 3 else count
                assert count < 3 or stored[block] >= 3
        assert not large, "counts in the tree without an entry in a bitmap"
        assert len(stored) == root.nr_allocated
        assert stored == reached
