"""PoolMetadata against a model, and each promise of its methods."""

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from devmapper import errors
from devmapper.errors import Space
from devmapper.thin import format as layout
from devmapper.thin.blocks import MemoryDevice
from devmapper.thin.metadata import PoolMetadata, is_blank
from devmapper.thin.space_map import Run
from devmapper.units import Bytes
from tests.support.audit import Audit

BLOCK = Bytes(64 * 1024)
STEPS = int(os.environ.get("MODEL_STEPS", "200"))  # thousands are a soak
DATA_BLOCKS = 20_000  # two bitmaps


def make(nr_metadata: int = 1024, nr_data: int = DATA_BLOCKS) -> tuple[MemoryDevice, PoolMetadata]:
    device = MemoryDevice(nr_metadata)
    return device, PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=nr_data)


def map_new(pool: PoolMetadata, thin_id: int, blocks) -> list[int]:
    blocks = list(blocks)
    data = pool.allocate_data_blocks(len(blocks))
    pool.insert_many(thin_id, list(zip(blocks, data, strict=True)))
    return data


class Model(RuleBasedStateMachine):
    """What the pool holds, as dicts; the audit looks at every commit."""

    thin = st.integers(0, 7)
    block = st.integers(0, 3000)
    length = st.sampled_from([1, 2, 16, 90, 300, 1000])
    stride = st.sampled_from([1, 1, 2, 7])

    @initialize(cache=st.sampled_from([2, 64, 4096]))
    def start(self, cache):
        self.cache = cache
        self.device, pool = make()
        pool.close()
        self.held: list[Run] = []
        self.now: dict[int, dict[int, int]] = {}
        self.committed: dict[int, dict[int, int]] = {}
        self.open()
        for thin_id in range(3):
            self.create_thin(thin_id)
            self.insert(thin_id, 100 * thin_id, 300, 1 + thin_id)

    def open(self):
        self.pool = PoolMetadata.open(self.device, data_block_size=BLOCK, cache_blocks=self.cache)

    def known(self, thin_id):
        if thin_id in self.now:
            return True
        with pytest.raises(errors.ThinIdMissing):
            self.pool.details(thin_id)
        return False

    @rule(thin_id=thin)
    def create_thin(self, thin_id):
        if thin_id in self.now:
            with pytest.raises(errors.ThinIdExists):
                self.pool.create_thin(thin_id)
            return
        self.pool.create_thin(thin_id)
        self.now[thin_id] = {}

    @rule(thin_id=thin, origin=thin)
    def create_snap(self, thin_id, origin):
        if thin_id in self.now or origin not in self.now:
            with pytest.raises(errors.ThinIdError):
                self.pool.create_snap(thin_id, origin)
            return
        self.pool.create_snap(thin_id, origin)
        self.now[thin_id] = dict(self.now[origin])

    @rule(thin_id=thin)
    def delete(self, thin_id):
        if self.known(thin_id):
            self.pool.delete(thin_id)
            del self.now[thin_id]

    @rule(thin_id=thin, begin=block, length=length, stride=stride)
    def insert(self, thin_id, begin, length, stride):
        if self.known(thin_id):
            blocks = range(begin, begin + length * stride, stride)
            try:
                data = map_new(self.pool, thin_id, blocks)
            except errors.PoolFull as err:
                assert err.kind is Space.DATA
                assert err.free < length
                return
            self.now[thin_id].update(zip(blocks, data, strict=True))

    @rule(thin_id=thin, begin=block, length=length)
    def remove(self, thin_id, begin, length):
        if self.known(thin_id):
            end = begin + length
            gone = [block for block in self.now[thin_id] if begin <= block < end]
            assert self.pool.remove_range(thin_id, begin, end) == len(gone)
            for block in gone:
                del self.now[thin_id][block]

    @rule()
    def commit(self):
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
    def release(self):
        self.pool.release_data_blocks(self.held)
        self.held = []

    @rule()
    def abort(self):
        self.pool.abort()
        self.now = {thin_id: dict(blocks) for thin_id, blocks in self.committed.items()}

    @rule()
    def reopen(self):
        self.held = []
        self.now = {thin_id: dict(blocks) for thin_id, blocks in self.committed.items()}
        self.open()

    @rule()
    def reserve_or_release_metadata_snap(self):
        if self.pool.held_root is None:
            self.held += self.pool.reserve_metadata_snap()
            self.committed = {thin_id: dict(blocks) for thin_id, blocks in self.now.items()}
        else:
            self.pool.release_metadata_snap()

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def equal(self):
        pool = self.pool
        assert pool.thin_ids() == sorted(self.now)
        used = {block for blocks in self.now.values() for block in blocks.values()}
        for thin_id, blocks in self.now.items():
            found = {}
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
        thin_id = rng.choice(sorted(model.now)) if model.now else 0
        begin, length = rng.randrange(3000), rng.choice([1, 2, 16, 90, 300, 1000])
        match rng.randrange(20):
            case 0:
                model.create_thin(rng.randrange(8))
            case 1 | 2 | 3:
                model.create_snap(rng.randrange(8), thin_id)
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
