"""PoolMetadata against a model, and each promise of its methods."""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from devmapper import errors
from devmapper.errors import Space
from devmapper.thin import checksum
from devmapper.thin import format as layout
from devmapper.thin.blocks import MemoryDevice
from devmapper.thin.metadata import PoolMetadata, is_blank
from devmapper.thin.space_map import Run
from devmapper.units import Bytes, ThinId, TransactionId
from tests.support.audit import Audit

BLOCK = Bytes(64 * 1024)
STEPS = int(os.environ.get("MODEL_STEPS", "200"))  # thousands are a soak
DATA_BLOCKS = 20_000  # two bitmaps
ONE, TWO = ThinId(1), ThinId(2)


def make(nr_metadata: int = 1024, nr_data: int = DATA_BLOCKS) -> tuple[MemoryDevice, PoolMetadata]:
    device = MemoryDevice(nr_metadata)
    return device, PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=nr_data)


def map_new(pool: PoolMetadata, thin_id: ThinId, blocks: Iterable[int]) -> list[int]:
    blocks = list(blocks)
    data = pool.allocate_data_blocks(len(blocks))
    pool.insert_many(thin_id, list(zip(blocks, data, strict=True)))
    return data


class Model(RuleBasedStateMachine):
    """What the pool holds, as dicts; the audit looks at every commit."""

    thin = st.integers(0, 7).map(ThinId)
    block = st.integers(0, 3000)
    length = st.sampled_from([1, 2, 16, 90, 300, 1000])
    stride = st.sampled_from([1, 1, 2, 7])

    @initialize(cache=st.sampled_from([2, 64, 4096]))
    def start(self, cache: int) -> None:
        self.cache = cache
        self.device, pool = make()
        pool.close()
        self.held: list[Run] = []
        self.now: dict[ThinId, dict[int, int]] = {}
        self.committed: dict[ThinId, dict[int, int]] = {}
        self.open()
        for thin_id in map(ThinId, range(3)):
            self.create_thin(thin_id)
            self.insert(thin_id, 100 * thin_id, 300, 1 + thin_id)

    def open(self) -> None:
        self.pool = PoolMetadata.open(self.device, data_block_size=BLOCK, cache_blocks=self.cache)

    def known(self, thin_id: ThinId) -> bool:
        if thin_id in self.now:
            return True
        with pytest.raises(errors.ThinIdMissing):
            self.pool.details(thin_id)
        return False

    @rule(thin_id=thin)
    def create_thin(self, thin_id: ThinId) -> None:
        if thin_id in self.now:
            with pytest.raises(errors.ThinIdExists):
                self.pool.create_thin(thin_id)
            return
        self.pool.create_thin(thin_id)
        self.now[thin_id] = {}

    @rule(thin_id=thin, origin=thin)
    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        if thin_id in self.now or origin not in self.now:
            with pytest.raises(errors.ThinIdError):
                self.pool.create_snap(thin_id, origin)
            return
        self.pool.create_snap(thin_id, origin)
        self.now[thin_id] = dict(self.now[origin])

    @rule(thin_id=thin)
    def delete(self, thin_id: ThinId) -> None:
        if self.known(thin_id):
            self.pool.delete(thin_id)
            del self.now[thin_id]

    @rule(thin_id=thin, begin=block, length=length, stride=stride)
    def insert(self, thin_id: ThinId, begin: int, length: int, stride: int) -> None:
        if self.known(thin_id):
            blocks = range(begin, begin + length * stride, stride)
            if self.pool.nr_allocatable_data_blocks < length:
                with pytest.raises(errors.PoolFull) as caught:
                    map_new(self.pool, thin_id, blocks)
                assert caught.value.kind is Space.DATA
                return
            data = map_new(self.pool, thin_id, blocks)
            self.now[thin_id].update(zip(blocks, data, strict=True))

    @rule(thin_id=thin, begin=block, length=length)
    def remove(self, thin_id: ThinId, begin: int, length: int) -> None:
        if self.known(thin_id):
            end = begin + length
            gone = [block for block in self.now[thin_id] if begin <= block < end]
            assert self.pool.remove_range(thin_id, begin, end) == len(gone)
            for block in gone:
                del self.now[thin_id][block]

    @rule()
    def commit(self) -> None:
        before = Counter(b for blocks in self.committed.values() for b in blocks.values())
        freed = self.pool.commit()
        self.committed = {thin_id: dict(blocks) for thin_id, blocks in self.now.items()}
        assert Audit(self.device).contents == self.now
        gone = {block for begin, length in freed for block in range(begin, begin + length)}
        after = {block for blocks in self.now.values() for block in blocks.values()}
        assert self.pool.held_root is not None or gone >= before.keys() - after
        assert not gone & after
        self.held += freed

    @rule()
    def release(self) -> None:
        self.pool.release_data_blocks(self.held)
        self.held = []

    @rule()
    def abort(self) -> None:
        self.pool.abort()
        self.now = {thin_id: dict(blocks) for thin_id, blocks in self.committed.items()}

    @rule()
    def reopen(self) -> None:
        self.held = []
        self.now = {thin_id: dict(blocks) for thin_id, blocks in self.committed.items()}
        self.open()

    @rule()
    def reserve_or_release_metadata_snap(self) -> None:
        if self.pool.held_root is None:
            self.held += self.pool.reserve_metadata_snap()
            self.committed = {thin_id: dict(blocks) for thin_id, blocks in self.now.items()}
        else:
            self.pool.release_metadata_snap()

    @rule(more=st.sampled_from([1, 100, layout.ENTRIES_PER_BITMAP, 2 * layout.ENTRIES_PER_BITMAP]))
    def grow_metadata(self, more: int) -> None:
        # Its size is not part of the transaction: an abort leaves the device as large as it is.
        self.device.nr_blocks = min(self.device.nr_blocks + more, 50_000)
        self.pool.resize_metadata(self.device.nr_blocks)
        assert self.pool.nr_metadata_blocks == self.device.nr_blocks

    @rule(more=st.sampled_from([1, 100, layout.ENTRIES_PER_BITMAP]))
    def grow_data(self, more: int) -> None:
        blocks = min(self.pool.nr_data_blocks + more, 100_000)
        self.pool.resize_data(blocks)
        assert self.pool.nr_data_blocks == blocks

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def equal(self) -> None:
        pool = self.pool
        assert pool.thin_ids() == sorted(self.now)
        used = {block for blocks in self.now.values() for block in blocks.values()}
        for thin_id, blocks in self.now.items():
            found: dict[int, int] = {}
            for keys, values in pool.find_packed(thin_id, 0, layout.MAX_KEY):
                found.update(zip(keys, layout.data_blocks(values), strict=True))
            assert found == blocks
            assert pool.mapped_blocks(thin_id) == len(blocks)
            assert pool.highest_mapped_block(thin_id) == max(blocks, default=None)
        assert all(pool.data_ref_count(block) for block in used)
        if pool.held_root is None:
            assert pool.nr_data_blocks - pool.nr_free_data_blocks == len(used)
        # Nobody may get a block that the last commit or the present refers to.
        keep = used | {b for blocks in self.committed.values() for b in blocks.values()}
        assert pool.nr_allocatable_data_blocks <= pool.nr_data_blocks - len(keep)


Model.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestModel = Model.TestCase


@pytest.mark.parametrize("cache", [2, 64, 4096])
def test_a_long_walk_through_the_model(cache):
    """The same rules with a mix that keeps the pool busy, which shrinking test cases avoid."""
    rng = random.Random(f"{cache} {STEPS}")
    model = Model()
    model.start(cache)
    for _ in range(STEPS):
        thin_id = rng.choice(sorted(model.now)) if model.now else ThinId(0)
        begin, length = rng.randrange(3000), rng.choice([1, 2, 16, 90, 300, 1000])
        match rng.randrange(20):
            case 0:
                model.create_thin(ThinId(rng.randrange(8)))
            case 1 | 2 | 3:
                model.create_snap(ThinId(rng.randrange(8)), thin_id)
            case 4:
                model.delete(thin_id)
            case 5 | 6 | 7:
                model.remove(thin_id, begin, length)
            case 8 | 9:
                model.commit()
            case 10:
                model.release()
            case 11:
                model.abort()
            case 12:
                model.reopen()
            case 13:
                model.reserve_or_release_metadata_snap()
            case _:
                model.insert(thin_id, begin, length, rng.choice([1, 2, 7]))
        model.equal()
    model.commit()


@pytest.fixture
def pool() -> PoolMetadata:
    return make()[1]


def test_a_new_pool_is_empty(pool):
    assert pool.thin_ids() == []
    assert (pool.transaction_id, pool.time, pool.held_root) == (0, 0, None)
    assert pool.data_block_size == BLOCK
    assert pool.nr_free_data_blocks == pool.nr_data_blocks == DATA_BLOCKS
    assert pool.nr_metadata_blocks == 1024
    assert not pool.changed
    assert pool.commit() == []


def test_blank_means_a_first_block_of_zeros() -> None:
    device = MemoryDevice(128)
    assert is_blank(device)
    device.write(5, b"\1" * 4096)
    assert is_blank(device)
    PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=10)
    assert not is_blank(device)


def test_details_are_those_of_the_kernel(pool):
    pool.set_transaction_id(TransactionId(0), TransactionId(7))
    pool.create_thin(ONE)
    map_new(pool, ONE, range(5))
    assert pool.details(ONE) == (5, 7, 0, 0)
    pool.set_transaction_id(TransactionId(7), TransactionId(8))
    pool.create_snap(TWO, ONE)
    assert pool.time == 1
    assert pool.details(ONE) == (5, 7, 0, 1)
    assert pool.details(TWO) == (5, 8, 1, 1)


def test_a_block_is_shared_until_it_is_written_after_the_snapshot(pool):
    pool.create_thin(ONE)
    map_new(pool, ONE, range(3))
    assert not pool.is_shared(ONE, pool.find(ONE, 1))
    pool.create_snap(TWO, ONE)
    assert pool.is_shared(ONE, pool.find(ONE, 1))
    assert pool.is_shared(TWO, pool.find(TWO, 1))
    map_new(pool, TWO, [1])
    assert not pool.is_shared(TWO, pool.find(TWO, 1))
    assert pool.find(TWO, 1) != pool.find(ONE, 1)


def test_a_mapping_that_is_replaced_lets_go_of_its_block(pool):
    pool.create_thin(ONE)
    (first,) = map_new(pool, ONE, [9])
    pool.insert(ONE, 9, first)  # the same block: its reference stays
    assert pool.data_ref_count(first) == 1
    (second,) = map_new(pool, ONE, [9])
    assert pool.data_ref_count(first) == 0
    assert pool.find(ONE, 9) == (second, 0)
    assert pool.mapped_blocks(ONE) == 1


def test_transaction_id_conflict(pool):
    with pytest.raises(errors.TransactionConflict) as caught:
        pool.set_transaction_id(TransactionId(4), TransactionId(5))
    assert (caught.value.pool, caught.value.expected) == (0, 4)


@pytest.mark.parametrize(
    "act",
    [
        lambda pool: pool.details(TWO),
        lambda pool: pool.delete(TWO),
        lambda pool: pool.find(TWO, 0),
        lambda pool: list(pool.find_range(TWO, 0, 9)),
        lambda pool: pool.packed_range(TWO, 0, 9),
        lambda pool: pool.insert(TWO, 0, 0),
        lambda pool: pool.remove(TWO, 0),
        lambda pool: pool.mapped_blocks(TWO),
        lambda pool: pool.highest_mapped_block(TWO),
        lambda pool: pool.create_snap(ThinId(3), TWO),
    ],
)
def test_a_missing_thin_is_missing_everywhere(pool, act):
    with pytest.raises(errors.ThinIdMissing) as caught:
        act(pool)
    assert caught.value.thin_id == TWO
    assert not pool.changed


def test_packed_range_marks_holes(pool):
    pool.create_thin(ONE)
    data = map_new(pool, ONE, [3, 4, 5, 9, 1000])
    packed = pool.packed_range(ONE, 2, 10)
    assert [n for n, value in enumerate(packed) if value != layout.UNMAPPED] == [1, 2, 3, 7]
    assert layout.data_blocks(packed[1:4]) == data[:3]
    assert set(pool.packed_range(ONE, 2000, 10)) == {layout.UNMAPPED}
    assert [block for block, _ in pool.find_range(ONE, 4, 1000)] == [4, 5, 9]


def test_read_only_refuses_every_change() -> None:
    device, pool = make()
    pool.create_thin(ONE)
    pool.commit()
    again = PoolMetadata.open(device, read_only=True)
    assert again.thin_ids() == [ONE]
    for act in (
        lambda: again.create_thin(TWO),
        lambda: again.delete(ONE),
        again.allocate_data_block,
        lambda: again.set_needs_check(needs_check=True),
        again.reserve_metadata_snap,
    ):
        with pytest.raises(errors.PoolUnusable, match="ro"):
            act()


def test_sizes_that_do_not_fit() -> None:
    device, pool = make()
    with pytest.raises(errors.PoolMismatch, match="65536 bytes"):
        PoolMetadata.open(device, data_block_size=Bytes(2 * BLOCK))
    with pytest.raises(errors.PoolMismatch, match="shrink"):
        pool.resize_data(DATA_BLOCKS - 1)
    with pytest.raises(errors.PoolMismatch, match="between"):
        pool.resize_metadata(1000)
    with pytest.raises(errors.PoolMismatch, match="between"):
        pool.resize_metadata(2000)
    device.nr_blocks = 1000
    with pytest.raises(errors.PoolMismatch, match="pool uses 1024"):
        PoolMetadata.open(device)


def test_growing_is_undone_by_abort() -> None:
    device, pool = make()
    device.nr_blocks = 40_000
    pool.resize_metadata(40_000)
    pool.resize_data(90_000)
    pool.abort()
    assert (pool.nr_metadata_blocks, pool.nr_data_blocks) == (1024, DATA_BLOCKS)
    pool.resize_metadata(40_000)
    pool.resize_data(90_000)
    pool.commit()
    Audit(device)
    again = PoolMetadata.open(device)
    assert (again.nr_metadata_blocks, again.nr_data_blocks) == (40_000, 90_000)


def test_only_one_metadata_snap(pool):
    with pytest.raises(errors.PoolMismatch, match="no metadata snap"):
        pool.release_metadata_snap()
    pool.reserve_metadata_snap()
    with pytest.raises(errors.PoolMismatch, match="already"):
        pool.reserve_metadata_snap()


def test_held_blocks_survive_an_abort() -> None:
    _, pool = make(nr_data=10)
    pool.create_thin(ONE)
    map_new(pool, ONE, range(10))
    pool.commit()
    pool.remove_range(ONE, 3, 6)
    runs = pool.commit()
    assert runs == [Run(3, 3)]
    pool.create_thin(TWO)
    pool.abort()
    with pytest.raises(errors.PoolFull):
        pool.allocate_data_block()
    pool.release_data_blocks(runs)
    assert pool.allocate_data_blocks(3) == [3, 4, 5]


def fill_metadata(pool: PoolMetadata, rng: random.Random) -> None:
    """Until not even one more mapping of ONE can be sure of its place."""
    for count in range(10_000):
        blocks = sorted(rng.sample(range(10**6), rng.choice([1, 16, 90])))
        if count % 40 == 39 and pool.nr_allocatable_data_blocks:
            with contextlib.suppress(errors.PoolFull):
                pool.create_snap(ThinId(1 + count), ONE)
        try:
            data = pool.allocate_data_blocks(len(blocks))
        except errors.PoolFull as err:
            if err.kind is Space.DATA:
                pytest.fail("data space was to last longer")
            return
        try:
            pool.insert_many(ONE, list(zip(blocks, data, strict=True)))
        except errors.PoolFull:
            for block in data:
                pool.dec_data_block(block)
            if len(blocks) == 1:
                return
        if count % 7 == 0:
            pool.release_data_blocks(pool.commit())
    pytest.fail("metadata never got full")


@pytest.mark.parametrize(("nr_metadata", "nr_data"), [(64, 20_000), (300, 10**6), (1000, 10**6)])
def test_full_metadata_refuse_and_still_commit_and_delete(nr_metadata, nr_data):
    device, pool = make(nr_metadata, nr_data)
    pool.create_thin(ONE)
    pool.commit()
    fill_metadata(pool, random.Random(nr_metadata))

    def create_many() -> None:
        for thin_id in range(100_000, 100_300):
            pool.create_thin(ThinId(thin_id))

    with pytest.raises(errors.PoolFull) as caught:
        create_many()
    assert caught.value.kind is Space.METADATA
    pool.commit()
    Audit(device)
    for thin_id in pool.thin_ids():
        pool.delete(thin_id)
        pool.commit()
    Audit(device)
    assert pool.nr_free_data_blocks == nr_data
    pool.create_thin(ONE)
    pool.commit()


def test_a_metadata_device_too_small_for_the_pool_is_refused() -> None:
    with pytest.raises(errors.PoolFull) as caught:
        make(10, nr_data=10**6)
    assert caught.value.kind is Space.METADATA


def busy_device() -> MemoryDevice:
    device, pool = make()
    pool.create_thin(ONE)
    map_new(pool, ONE, range(2000))
    for thin_id in range(2, 8):
        pool.create_snap(ThinId(thin_id), ONE)
        map_new(pool, ThinId(thin_id), range(0, 2000, 300))
    pool.commit()
    return device


def use_everything(device: MemoryDevice) -> None:
    pool = PoolMetadata.open(device)
    assert pool.data_ref_count(DATA_BLOCKS - 1) == 0
    for thin_id in pool.thin_ids():
        map_new(pool, thin_id, range(50, 2050, 100))
    for thin_id in pool.thin_ids():
        pool.delete(thin_id)
    pool.commit()


def blocks_in_use(device: MemoryDevice) -> list[int]:
    counts = PoolMetadata.open(device)._metadata
    return [block for block in range(1024) if counts.count(block)]


def test_a_flipped_bit_in_any_block_is_an_integrity_error_that_names_it() -> None:
    device = busy_device()
    rng = random.Random(3)
    for block in blocks_in_use(device):
        damaged = MemoryDevice(1024)
        damaged._blocks = dict(device._blocks)
        raw = bytearray(device.read(block))
        raw[rng.randrange(4096)] ^= 1 << rng.randrange(8)
        damaged.write(block, bytes(raw))
        with pytest.raises((errors.ChecksumError, errors.FormatError)) as caught:
            use_everything(damaged)
        assert getattr(caught.value, "block", None) == block


@pytest.mark.parametrize("seed", range(max(STEPS // 100, 1)))
def test_damage_below_a_right_checksum_is_never_a_stray_exception(seed):
    device = busy_device()
    rng = random.Random(seed)
    kinds = {kind.salt: kind for kind in layout.BLOCK_KINDS}
    for block in blocks_in_use(device):
        raw = bytearray(device.read(block))
        kind = next(
            kind for kind in kinds.values() if checksum.seal(bytes(raw), kind) == bytes(raw)
        )
        for _ in range(rng.choice([1, 1, 8])):
            at = rng.choice([rng.randrange(64), rng.randrange(4096)])
            raw[at] = rng.randrange(256)
        damaged = MemoryDevice(1024)
        damaged._blocks = dict(device._blocks)
        damaged.write(block, checksum.seal(bytes(raw), kind))
        try:
            use_everything(damaged)
        except errors.DevmapperError:
            continue


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("magic", 1, errors.FormatError),
        ("version", 3, errors.FormatError),
        ("version", 0, errors.FormatError),
        ("incompat_flags", 1, errors.FormatError),
        ("compat_ro_flags", 1, errors.FormatError),
        ("metadata_block_size", 16, errors.FormatError),
        ("blocknr", 1, errors.FormatError),
        ("data_mapping_root", 5000, errors.FormatError),
        ("device_details_root", 0, errors.FormatError),
        ("data_space_map_root", bytes(128), errors.FormatError),
        ("metadata_space_map_root", bytes(128), errors.FormatError),
    ],
)
def test_a_superblock_with_a_wrong_field(field, value, error):
    device = busy_device()
    superblock = layout.Superblock.unpack(device.read(0))._replace(**{field: value})
    device.write(0, checksum.seal(superblock.pack(), layout.SUPERBLOCK))
    with pytest.raises(error):
        use_everything(device)


def test_only_the_ro_flags_let_a_reader_in() -> None:
    device = busy_device()
    superblock = layout.Superblock.unpack(device.read(0))._replace(compat_ro_flags=1)
    device.write(0, checksum.seal(superblock.pack(), layout.SUPERBLOCK))
    assert len(PoolMetadata.open(device, read_only=True).thin_ids()) == 7


def test_the_flag_needs_check_is_written_at_once_and_apart_from_the_transaction() -> None:
    device, pool = make()
    pool.create_thin(ONE)
    pool.set_needs_check(needs_check=True)
    assert PoolMetadata.open(device).needs_check
    assert PoolMetadata.open(device).thin_ids() == []
    pool.commit()
    again = PoolMetadata.open(device)
    assert again.needs_check
    assert again.thin_ids() == [ONE]
