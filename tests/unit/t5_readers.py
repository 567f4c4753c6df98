"""The readers of pool metadata on golden images and on damaged copies; no tool is needed."""

import hashlib
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devmapper.errors import IntegrityError, ThinIdMissing, UsageError
from devmapper.thin.blocks import FileDevice, MemoryDevice
from devmapper.thin.check import CheckReport, DamageKind, check
from devmapper.thin.checksum import seal
from devmapper.thin.delta import bounded_ranges, changed_ranges, delta
from devmapper.thin.dump import dump
from devmapper.thin.format import (
    BITMAP,
    BLOCK_SIZE,
    BTREE_NODE,
    DEVICE_DETAILS_SIZE,
    MAPPING_SIZE,
    METADATA_INDEX,
    SUPERBLOCK,
    DeviceDetails,
    IndexEntry,
    MetadataIndex,
    NodeFlags,
    NodeHeader,
    SpaceMapRoot,
    Superblock,
    max_entries,
    pack_bitmap,
    pack_mapping,
    pack_node,
)
from devmapper.thin.format import ENTRIES_PER_BITMAP as ENTRIES
from devmapper.thin.ls import ls
from devmapper.thin.metadata import PoolMetadata
from devmapper.thin.walk import BlockReader
from devmapper.units import Bytes, Sectors, ThinId, TransactionId
from tests.support import metadata_writer as on_disk
from tests.support.fixtures import DATA, unpack_image
from tests.support.metadata_writer import Image

IMAGES = ("empty", "snapshots", "deep", "held")


@pytest.fixture(params=IMAGES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return unpack_image(request.param, tmp_path)


def checked(path: Path, *, metadata_snap: bool = False, skip_mappings: bool = False) -> CheckReport:
    with FileDevice.open(path, read_only=True) as device:
        return check(device, metadata_snap=metadata_snap, skip_mappings=skip_mappings)


def test_golden_images_are_clean(golden: Path) -> None:
    report = checked(golden)
    assert report.damages == []
    assert report.clean
    assert (report.leaked_data_blocks, report.leaked_metadata_blocks) == (0, 0)
    assert not report.needs_check


def test_dump_equals_the_recorded_thin_dump(golden: Path) -> None:
    expected = zstandard.ZstdDecompressor().decompress(
        (DATA / f"{golden.stem}.xml.zst").read_bytes()
    )
    with FileDevice.open(golden, read_only=True) as device:
        assert "".join(dump(device)) == expected.decode()


def test_ls_equals_the_recorded_thin_ls(golden: Path) -> None:
    lines = (DATA / f"{golden.stem}.ls").read_text().splitlines()
    with FileDevice.open(golden, read_only=True) as device:
        assert [list(usage[:7]) for usage in ls(device)] == [
            [int(word) for word in line.split()] for line in lines
        ]


def test_ls_knows_the_highest_mapped_block(tmp_path: Path) -> None:
    with FileDevice.open(unpack_image("deep", tmp_path)) as device:
        assert [usage.highest_mapped_block for usage in ls(device)] == [119_999]


def test_reading_changes_nothing(golden: Path) -> None:
    before = hashlib.sha256(golden.read_bytes()).digest()
    golden.chmod(0o444)
    with FileDevice.open(golden, read_only=True) as device:
        check(device)
        for _ in dump(device):
            pass
        usages = ls(device)
        for usage in usages[:2]:
            list(delta(device, usage.thin_id, usages[-1].thin_id))
    assert hashlib.sha256(golden.read_bytes()).digest() == before


def test_dump_of_chosen_thin_devices(tmp_path: Path) -> None:
    with FileDevice.open(unpack_image("held", tmp_path)) as device:
        text = "".join(dump(device, dev_ids={2, 77}))
    assert text.count("<device ") == 1
    assert '<device dev_id="2"' in text


def test_a_metadata_snap_is_read_like_the_pool(tmp_path: Path) -> None:
    path = unpack_image("held", tmp_path)
    assert checked(path, metadata_snap=True).clean
    with FileDevice.open(path) as device:
        snap = "".join(dump(device, metadata_snap=True)).splitlines()
        assert snap[1:] == "".join(dump(device)).splitlines()[1:]
        assert 'nr_data_blocks="0"' in snap[0]
        assert ls(device, metadata_snap=True) == ls(device)
        assert list(delta(device, 1, 2, metadata_snap=True)) == list(delta(device, 1, 2))


@pytest.mark.parametrize("read", [check, ls, lambda *a, **k: list(dump(*a, **k))])
def test_a_metadata_snap_that_is_not_held_is_an_error_of_use(
    read: Callable[..., object], tmp_path: Path
) -> None:
    with (
        FileDevice.open(unpack_image("empty", tmp_path)) as device,
        pytest.raises(UsageError, match="no metadata snap"),
    ):
        read(device, metadata_snap=True)


def test_delta_of_a_thin_device_that_does_not_exist(tmp_path: Path) -> None:
    with (
        FileDevice.open(unpack_image("held", tmp_path)) as device,
        pytest.raises(ThinIdMissing) as caught,
    ):
        list(delta(device, 1, 9))
    assert caught.value.thin_id == 9


def test_delta_and_changed_ranges(tmp_path: Path) -> None:
    with FileDevice.open(unpack_image("held", tmp_path)) as device:
        assert list(delta(device, 1, 3)) == [
            (0, 300, "same"),
            (1000, 50, "left_only"),
            (3000, 50, "right_only"),
        ]
        assert list(delta(device, 1, 3, include_same=False)) == list(delta(device, 1, 3))[1:]
        assert list(changed_ranges(device, 1, 3)) == [(1000, 50), (3000, 50)]
        assert list(changed_ranges(device, 2, 2)) == []


def test_changed_ranges_merge_runs_of_different_kinds(tmp_path: Path) -> None:
    with FileDevice.open(unpack_image("snapshots", tmp_path)) as device:
        changed = {
            block
            for run in delta(device, 1, 2)
            if run.kind != "same"
            for block in range(run.begin, run.begin + run.length)
        }
        ranges = list(changed_ranges(device, 1, 2))
    assert changed == {b for r in ranges for b in range(r.begin, r.begin + r.length)}
    assert all(a.begin + a.length < b.begin for a, b in pairwise(ranges))


# Damage.  Each case names what the report must name.


def the_only_damage(image: Image) -> str:
    (damage,) = checked(image.path).damages
    return f"{damage.kind} {damage.block} {damage.thin_ids}"


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(unpack_image("snapshots", tmp_path))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (on_disk.MAGIC_AT, 1),
        (on_disk.VERSION_AT, 3),
        (on_disk.INCOMPAT_AT, 1),
        (on_disk.DATA_BLOCK_SIZE_AT, 100),
        (on_disk.METADATA_BLOCK_SIZE_AT, 16),
        (8, 5),  # blocknr
    ],
)
def test_a_superblock_of_another_format(image: Image, offset: int, value: int) -> None:
    image.set_u32(0, offset, value, on_disk.SUPERBLOCK_SALT)
    assert the_only_damage(image) == "superblock 0 ()"
    with FileDevice.open(image.path) as device, pytest.raises(IntegrityError):
        next(dump(device))


def test_a_superblock_with_a_flipped_bit(image: Image) -> None:
    image.flip(0, 100)
    assert the_only_damage(image) == "superblock 0 ()"


def test_needs_check_is_told_and_is_no_damage(image: Image) -> None:
    image.set_u32(0, on_disk.FLAGS_AT, 1, on_disk.SUPERBLOCK_SALT)
    report = checked(image.path)
    assert report.needs_check
    assert report.clean


def test_a_flipped_bit_in_a_leaf_names_the_thin_device_and_its_keys(image: Image) -> None:
    leaf = image.first_leaf(image.thin_root(7))
    image.flip(leaf, 500)
    (damage,) = checked(image.path).damages
    assert (damage.kind, damage.block, damage.thin_ids) == (DamageKind.MAPPING, leaf, (7,))
    assert damage.keys is not None
    assert damage.keys.begin == 0
    assert 0 < damage.keys.end < 600
    assert "checksum" in str(damage)
    with FileDevice.open(image.path) as device:
        pieces: list[str] = []
        with pytest.raises(IntegrityError):
            pieces.extend(dump(device))
        assert 'dev_id="6"' in "".join(pieces)
        with pytest.raises(IntegrityError):
            ls(device)
        with pytest.raises(IntegrityError):
            list(delta(device, 6, 7))
        assert list(delta(device, 5, 6))


def test_a_block_that_was_written_elsewhere(image: Image) -> None:
    leaf = image.first_leaf(image.thin_root(3))
    image.set_u64(leaf, 8, leaf + 1, on_disk.NODE_SALT)
    assert the_only_damage(image) == f"mapping {leaf} (3,)"


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (4, 3),  # flags
        (4, 0),
        (16, 300),  # nr_entries
        (16, 2),  # less than a third full
        (20, 1000),  # max_entries
        (20, 251),
        (24, 24),  # value_size
        (on_disk.KEYS_AT + 8, 0),  # keys that do not ascend
    ],
)
def test_a_node_with_a_wrong_header_or_key(image: Image, offset: int, value: int) -> None:
    leaf = image.first_leaf(image.thin_root(3))
    image.set_u32(leaf, offset, value, on_disk.NODE_SALT)
    found = [d for d in checked(image.path).damages if d.kind == DamageKind.MAPPING]
    assert [(d.block, d.thin_ids) for d in found] == [(leaf, (3,))]


def test_a_node_below_itself(image: Image) -> None:
    root = image.thin_root(4)
    image.set_u64(root, image.value_at(root, 0), root, on_disk.NODE_SALT)
    first = checked(image.path).damages[0]
    assert (first.kind, first.block, first.thin_ids) == (DamageKind.MAPPING, root, (4,))
    with FileDevice.open(image.path) as device:
        for read in (
            lambda: list(dump(device)),
            lambda: ls(device),
            lambda: list(delta(device, 1, 4)),
        ):
            with pytest.raises(IntegrityError):
                read()


def test_two_trees_that_claim_one_node(image: Image) -> None:
    image.set_u64(0, on_disk.DETAILS_ROOT_AT, image.mapping_root, on_disk.SUPERBLOCK_SALT)
    kinds = {(d.kind, d.block) for d in checked(image.path).damages}
    assert (DamageKind.DETAILS, image.mapping_root) in kinds


def test_a_child_beyond_the_device(image: Image) -> None:
    root = image.thin_root(4)
    image.set_u64(root, image.value_at(root, 0), 1 << 60, on_disk.NODE_SALT)
    found = [d for d in checked(image.path).damages if d.kind == DamageKind.MAPPING]
    assert [(d.block, d.thin_ids) for d in found] == [(1 << 60, (4,))]


def test_a_data_block_beyond_the_pool(image: Image) -> None:
    leaf = image.first_leaf(image.thin_root(4))
    image.set_u64(leaf, image.value_at(leaf, 9), 1 << 60, on_disk.NODE_SALT)
    damages = checked(image.path).damages
    assert (damages[0].kind, damages[0].block) == (DamageKind.MAPPING, leaf)
    assert damages[0].thin_ids == (4,)
    assert "mapping 9" in str(damages[0])
    with FileDevice.open(image.path) as device, pytest.raises(IntegrityError):
        ls(device)


def test_a_wrong_number_of_mapped_blocks(image: Image) -> None:
    root = image.details_root
    assert image.u32(root, 4) == 2
    image.set_u64(root, image.value_at(root, 1, 24), 5, on_disk.NODE_SALT)
    assert the_only_damage(image) == f"details {root} (2,)"


def test_a_thin_device_in_one_tree_only(image: Image) -> None:
    root = image.details_root
    image.set_u64(root, on_disk.KEYS_AT + 8 * 39, 99, on_disk.NODE_SALT)  # was 40
    found = {(d.kind, d.thin_ids) for d in checked(image.path).damages}
    assert found == {(DamageKind.MAPPING, (99,)), (DamageKind.DETAILS, (40,))}
    with FileDevice.open(image.path) as device:
        with pytest.raises(IntegrityError, match="thin id 40"):
            list(dump(device))
        with pytest.raises(IntegrityError, match="thin id 40"):
            ls(device)


def test_a_flipped_bit_in_each_part_of_the_space_maps(image: Image, tmp_path: Path) -> None:
    places = {
        image.metadata_index: DamageKind.INDEX,
        image.data_index: DamageKind.INDEX,
        image.metadata_bitmap(): DamageKind.BITMAP,
        image.data_bitmap(1): DamageKind.BITMAP,
        image.data_ref_counts: DamageKind.NODE,
    }
    for block, kind in places.items():
        copy = image.copy(tmp_path / "copy.bin")
        copy.flip(block, 77)
        first = checked(copy.path).damages[0]
        assert (first.kind, first.block) == (kind, block)


def test_a_data_block_with_too_low_a_count(image: Image) -> None:
    leaf = image.first_leaf(image.thin_root(9))
    own = next(
        value >> 24
        for at in range(image.u32(leaf, 16))
        if (value := image.u64(leaf, image.value_at(leaf, at))) >> 24 >= 9000
    )
    image.set_bitmap_count(image.data_bitmap(), own, 0)
    damages = checked(image.path).damages
    assert any(
        (d.kind, d.block, d.space) == (DamageKind.DATA_REF_COUNT, own, "data") for d in damages
    )
    # What the bitmap now says is free was counted as allocated.
    assert {d.kind for d in damages} <= {
        DamageKind.DATA_REF_COUNT,
        DamageKind.INDEX,
        DamageKind.SUPERBLOCK,
    }


def test_leaked_blocks_are_counted_in_runs(image: Image) -> None:
    for entry in (700, 701, 702, 800):
        assert image.bitmap_count(image.data_bitmap(), entry) == 0
        image.set_bitmap_count(image.data_bitmap(), entry, 1)
    free = next(i for i in range(16000) if not image.bitmap_count(image.metadata_bitmap(), i))
    image.set_bitmap_count(image.metadata_bitmap(), free + 500, 1)
    report = checked(image.path)
    assert (report.leaked_data_blocks, report.leaked_metadata_blocks) == (4, 1)
    leaks = [d for d in report.damages if d.kind == DamageKind.LEAK]
    assert [(d.space, d.block, d.nr_blocks) for d in leaks] == [
        ("data", 700, 3),
        ("data", 800, 1),
        ("metadata", free + 500, 1),
    ]
    assert str(leaks[0]) == "data blocks 700 to 702: reference count is 1, expected 0"


def test_an_overflow_count_that_is_wrong(image: Image) -> None:
    leaf = image.data_ref_counts
    while image.u32(leaf, 4) == 1:
        leaf = image.u64(leaf, image.value_at(leaf, 0))
    block = image.u64(leaf, on_disk.KEYS_AT)
    image.set_u32(leaf, image.value_at(leaf, 0, 4), 4, on_disk.NODE_SALT)
    assert the_only_damage(image) == f"data ref count {block} ()"


def test_counts_that_contradict_themselves(image: Image) -> None:
    index = image.data_index
    nr_free_at = image.value_at(index, 0, 16) + 8
    image.set_u32(index, nr_free_at, image.u32(index, nr_free_at) + 9, on_disk.NODE_SALT)
    assert the_only_damage(image) == f"index {image.data_bitmap()} ()"
    image.set_u64(0, on_disk.DATA_SM_AT + 8, 1, on_disk.SUPERBLOCK_SALT)
    assert [d.kind for d in checked(image.path).damages] == ["index", "superblock"]


def test_a_metadata_summary_that_promises_too_little_is_a_note(image: Image) -> None:
    """thin_restore leaves one behind; too much is promised by damage only."""
    index, nr_free_at = image.metadata_index, 24
    before = checked(image.path)
    free = image.u32(index, nr_free_at)
    image.set_u32(index, nr_free_at, free - 100, on_disk.INDEX_SALT)
    report = checked(image.path)
    assert report.clean
    assert [note.kind for note in report.notes].count(DamageKind.INDEX) >= 1
    assert f"is {free - 100}" in "".join(map(str, report.notes))
    assert f"is {free - 100}" not in "".join(map(str, before.notes))
    image.set_u32(index, nr_free_at, free + 100, on_disk.INDEX_SALT)
    assert the_only_damage(image) == f"index {image.metadata_bitmap()} ()"


@pytest.mark.parametrize("offset", [on_disk.DATA_SM_AT, on_disk.METADATA_SM_AT])
def test_a_space_map_larger_than_can_be(image: Image, offset: int) -> None:
    image.set_u64(0, offset, 1 << 62, on_disk.SUPERBLOCK_SALT)
    first = checked(image.path).damages[0]
    assert (first.kind, first.block) == (DamageKind.SUPERBLOCK, 0)


def test_a_truncated_file(image: Image) -> None:
    image.truncate(60)
    damages = checked(image.path).damages
    assert (damages[0].kind, damages[0].block) == (DamageKind.SUPERBLOCK, 0)
    assert "metadata_nr_blocks" in str(damages[0])
    assert len(damages) > 1
    image.truncate(0)
    assert [d.kind for d in checked(image.path).damages] == ["superblock"]


def test_skip_mappings_reads_no_mapping(image: Image) -> None:
    leaf = image.first_leaf(image.thin_root(7))
    image.flip(leaf, 500)
    assert checked(image.path, skip_mappings=True).clean
    image.flip(image.data_bitmap(), 50)
    assert not checked(image.path, skip_mappings=True).clean


def test_progress_ends_with_no_more_than_there_is(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with FileDevice.open(unpack_image("snapshots", tmp_path)) as device:
        assert check(device, progress=lambda *done: told.append(done)).clean
    assert told == sorted(told)
    assert all(0 < done <= total for done, total in told)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_any_sealed_nonsense_ends_in_a_report(seed: int, tmp_path: Path) -> None:
    """Blocks overwritten with random bytes and sealed again: worse than what disks do."""
    device = _load("held", tmp_path)
    chance = random.Random(seed)
    used = [block for block in range(device.nr_blocks) if any(device.read(block))]
    for block in chance.sample(used, 3):
        raw = bytearray(device.read(block))
        for _ in range(chance.choice((1, 4, 40))):
            at = chance.randrange(16, 64 if chance.random() < 0.5 else BLOCK_SIZE)
            raw[at] = chance.randrange(256)
        kind = chance.choice((SUPERBLOCK, BTREE_NODE, BITMAP, METADATA_INDEX))
        device.write(block, seal(bytes(raw), kind))
    for damage in check(device).damages:
        assert str(damage)
    for read in (lambda: list(dump(device)), lambda: ls(device), lambda: list(delta(device, 1, 3))):
        try:
            read()
        except (IntegrityError, ThinIdMissing):
            continue


def test_random_bytes_are_not_metadata() -> None:
    device = MemoryDevice(64)
    chance = random.Random(5)
    for block in range(64):
        device.write(block, chance.randbytes(BLOCK_SIZE))
    assert [d.kind for d in check(device).damages] == ["superblock"]


def _load(name: str, folder: Path) -> MemoryDevice:
    folder = folder / name
    folder.mkdir(exist_ok=True)
    raw = unpack_image(name, folder).read_bytes()
    device = MemoryDevice(len(raw) // BLOCK_SIZE)
    for block in range(device.nr_blocks):
        device.write(block, raw[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE])
    return device


# Many snapshots of one origin, as the kernel shares them: one leaf below all of them.


def shared_pool(nr_snapshots: int, nr_mappings: int) -> MemoryDevice:
    """Thin devices 1 to *nr_snapshots*; all share one root, but the last shares nothing."""
    device = MemoryDevice(4096)
    counts = bytearray(ENTRIES)
    data_counts = bytearray(ENTRIES)
    following = iter(range(1, 4096))

    def node(*, leaf: bool, size: int, entries: list[tuple[int, bytes]]) -> int:
        block = next(following)
        flags = NodeFlags.LEAF if leaf else NodeFlags.INTERNAL
        header = NodeHeader(0, flags, block, len(entries), max_entries(size), size, 0)
        keys = b"".join(key.to_bytes(8, "little") for key, _ in entries)
        values = b"".join(value for _, value in entries)
        device.write(block, seal(pack_node(header, keys, values), BTREE_NODE))
        counts[block] += 1
        return block

    def tree(size: int, entries: list[tuple[int, bytes]]) -> int:
        half = max_entries(size) // 2
        starts = range(0, max(len(entries) - half, 0) + 1, half)
        below = []
        for at, end in zip(starts, [*starts[1:], len(entries)], strict=True):
            first = entries[at][0] if entries else 0
            below.append((first, node(leaf=True, size=size, entries=entries[at:end])))
        if len(below) == 1:
            return below[0][1]
        children = [(key, block.to_bytes(8, "little")) for key, block in below]
        return node(leaf=False, size=8, entries=children)

    def mapping(block: int) -> bytes:
        return pack_mapping(block, 0).to_bytes(8, "little")

    shared = tree(MAPPING_SIZE, [(i, mapping(i)) for i in range(nr_mappings)])
    own = tree(MAPPING_SIZE, [(i, mapping(nr_mappings + i)) for i in range(nr_mappings)])
    data_counts[: 2 * nr_mappings] = b"\x01" * (2 * nr_mappings)
    roots = [(i, shared) for i in range(1, nr_snapshots)] + [(nr_snapshots, own)]
    top = tree(8, [(i, root.to_bytes(8, "little")) for i, root in roots])
    overflow = [(shared, (nr_snapshots - 1).to_bytes(4, "little"))]
    details = DeviceDetails(nr_mappings, TransactionId(0), 0, 0).pack()
    assert len(details) == DEVICE_DETAILS_SIZE
    details_root = tree(DEVICE_DETAILS_SIZE, [(i, details) for i, _ in roots])
    counts[0] = 1
    data_bitmap = next(following)
    device.write(data_bitmap, seal(pack_bitmap(data_bitmap, data_counts), BITMAP))
    data_entry = IndexEntry(data_bitmap, ENTRIES - 2 * nr_mappings, 2 * nr_mappings)
    data_root = SpaceMapRoot(
        10_000,
        2 * nr_mappings,
        node(leaf=True, size=16, entries=[(0, data_entry.pack())]),
        node(leaf=True, size=4, entries=[]),
    )
    ref_counts = node(leaf=True, size=4, entries=overflow)
    bitmap, index = next(following), next(following)
    for block in (data_bitmap, bitmap, index):
        counts[block] = 1
    counts[shared] = 3
    device.write(bitmap, seal(pack_bitmap(bitmap, counts), BITMAP))
    entries = (IndexEntry(bitmap, ENTRIES - index - 1, index + 1), *(IndexEntry(0, 0, 0),) * 254)
    device.write(index, seal(MetadataIndex(0, 0, index, entries).pack(), METADATA_INDEX))
    metadata_root = SpaceMapRoot(4096, index + 1, index, ref_counts)
    superblock = Superblock(
        csum=0,
        flags=0,
        blocknr=0,
        uuid=bytes(16),
        magic=27022010,
        version=2,
        time=1,
        trans_id=TransactionId(1),
        held_root=0,
        data_space_map_root=data_root.pack(),
        metadata_space_map_root=metadata_root.pack(),
        data_mapping_root=top,
        device_details_root=details_root,
        data_block_size=Sectors(128),
        metadata_block_size=Sectors(8),
        metadata_nr_blocks=4096,
        compat_flags=0,
        compat_ro_flags=0,
        incompat_flags=0,
    )
    device.write(0, seal(superblock.pack(), SUPERBLOCK))
    return device


class CountingDevice:
    """Counts how often each block is read."""

    def __init__(self, device: BlockReader) -> None:
        self._device = device
        self.reads = 0
        self.most = 0
        self._by_block: dict[int, int] = {}

    @property
    def nr_blocks(self) -> int:
        return self._device.nr_blocks

    def read(self, block: int) -> bytes:
        self.reads += 1
        self._by_block[block] = self._by_block.get(block, 0) + 1
        self.most = max(self.most, self._by_block[block])
        return self._device.read(block)


def test_a_thousand_snapshots_read_each_node_a_few_times() -> None:
    device = CountingDevice(shared_pool(1000, 4000))
    report = check(device)
    assert report.damages == []
    assert device.reads < 200
    assert device.most <= 4

    usages = ls(shared_pool(1000, 4000))
    assert [u.exclusive_blocks for u in usages] == [0] * 999 + [4000]
    assert {u.mapped_blocks for u in usages} == {4000}


def test_damage_below_many_snapshots_names_all_of_them() -> None:
    device = shared_pool(20, 400)
    leaf = next(block for block in range(1, 10) if NodeHeader.unpack(device.read(block)).is_leaf)
    raw = bytearray(device.read(leaf))
    raw[999] ^= 1
    device.write(leaf, bytes(raw))
    (damage,) = check(device).damages
    assert damage.block == leaf
    assert damage.thin_ids == tuple(range(1, 20))
    assert str(damage).endswith("thin ids 1, 2, 3, 4, 5, 6, 7, 8 and 11 more")


def test_changed_ranges_read_no_shared_leaf() -> None:
    whole = shared_pool(3, 4000)
    device = CountingDevice(whole)
    assert list(changed_ranges(device, 1, 2)) == []
    assert device.reads < 10
    assert list(delta(whole, 1, 2)) == [(0, 4000, "same")]
    assert list(delta(whole, 1, 3)) == [(0, 4000, "differ")]


@pytest.mark.parametrize("limit", [1, 2, 7, 500])
def test_bounded_ranges_lose_nothing(limit: int) -> None:
    device = MemoryDevice(1024)
    metadata = PoolMetadata.format(device, data_block_size=Bytes(65536), nr_data_blocks=4096)
    metadata.create_thin(ThinId(1))
    metadata.create_thin(ThinId(2))
    blocks = [*range(0, 900, 3), 5000, 5001, 90_000]
    data = metadata.allocate_data_blocks(len(blocks))
    metadata.insert_many(ThinId(1), list(zip(blocks, data, strict=True)))
    metadata.commit()
    exact = list(changed_ranges(device, 1, 2))
    found = bounded_ranges(device, metadata.superblock, 1, 2, limit=limit)
    assert len(found) == min(limit, len(exact)) or len(found) < limit
    covered = {block for begin, length in found for block in range(begin, begin + length)}
    assert set(blocks) <= covered
    assert found == sorted(found)
    if limit > len(exact):
        assert found == exact
    if limit == 7:
        assert 50_000 not in covered
