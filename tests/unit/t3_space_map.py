import random
from collections import Counter

import pytest

from devmapper.errors import FormatError, PoolFull, Space
from devmapper.thin.blocks import MemoryDevice
from devmapper.thin.format import ENTRIES_PER_BITMAP
from devmapper.thin.space_map import DataSpaceMap, MetadataSpaceMap, Run
from devmapper.thin.transaction_manager import TransactionManager


class Maps:
    """Both space maps on one device, committed without a superblock."""

    def __init__(self, nr_metadata: int = 600, nr_data: int = 40_000) -> None:
        self.device = MemoryDevice(nr_metadata)
        self.tm = TransactionManager(self.device)
        self.metadata = MetadataSpaceMap.create(self.tm, nr_metadata)
        self.data = DataSpaceMap.create(self.tm, nr_data)
        self.commit()

    def commit(self) -> list[Run]:
        self.roots = self.data.flush(), self.metadata.flush()
        self.tm.write_back()
        self.tm.committed()
        self.metadata.committed()
        return self.data.committed()

    def reopen(self) -> None:
        self.tm = TransactionManager(self.device)
        self.metadata = MetadataSpaceMap.open(self.tm, self.roots[1])
        self.data = DataSpaceMap.open(self.tm, self.roots[0])


@pytest.fixture
def maps() -> Maps:
    return Maps()


def test_blocks_are_handed_out_from_the_start_and_in_a_row(maps):
    assert maps.data.allocate() == 0
    assert maps.data.allocate_many(5) == [1, 2, 3, 4, 5]
    assert maps.data.nr_allocated == 6


def test_allocation_crosses_bitmaps_and_fills_holes(maps):
    first = maps.data.allocate_many(ENTRIES_PER_BITMAP + 10)
    assert first == list(range(ENTRIES_PER_BITMAP + 10))
    for block in (5, 6, 900, ENTRIES_PER_BITMAP - 1):
        maps.data.dec(block)
    maps.data.release(maps.commit())
    assert maps.data.allocate_many(5) == [5, 6, 900, ENTRIES_PER_BITMAP - 1, first[-1] + 1]


def test_a_full_device_says_so_and_keeps_what_it_has(maps):
    maps.data.allocate_many(39_990)
    with pytest.raises(PoolFull) as caught:
        maps.data.allocate_many(11)
    assert (caught.value.kind, caught.value.free, caught.value.needed) == (Space.DATA, 10, 11)
    assert len(maps.data.allocate_many(10)) == 10
    with pytest.raises(PoolFull):
        maps.data.allocate()


def test_a_freed_block_waits_for_the_commit_and_for_its_release(maps):
    blocks = maps.data.allocate_many(40_000)
    maps.commit()
    maps.data.dec(blocks[100])
    maps.data.dec(blocks[101])
    assert maps.data.nr_free == 2
    with pytest.raises(PoolFull):
        maps.data.allocate()
    freed = maps.commit()
    assert freed == [Run(100, 2)]
    with pytest.raises(PoolFull):
        maps.data.allocate()
    maps.data.release([Run(101, 1)])
    assert maps.data.allocate() == 101
    with pytest.raises(PoolFull):
        maps.data.allocate()
    with pytest.raises(ValueError, match="held"):
        maps.data.release([Run(100, 2)])


def test_freed_runs_are_joined_across_bitmaps(maps):
    maps.data.allocate_many(40_000)
    maps.commit()
    maps.data.dec_many(range(ENTRIES_PER_BITMAP - 3, ENTRIES_PER_BITMAP + 3))
    maps.data.dec_many([39_999])
    assert maps.commit() == [Run(ENTRIES_PER_BITMAP - 3, 6), Run(39_999, 1)]
    assert maps.commit() == []


def test_metadata_never_goes_to_a_block_that_the_last_commit_uses(maps):
    blocks = [maps.tm.allocate() for _ in range(20)]
    maps.commit()
    for block in blocks:
        maps.tm.dec(block)
    again = {maps.tm.allocate() for _ in range(20)}
    assert not again & set(blocks)
    fresh = again.pop()
    maps.tm.dec(fresh)
    assert maps.tm.allocate() == fresh  # of this transaction: nobody can miss it
    maps.commit()
    assert {maps.tm.allocate() for _ in range(20)} & set(blocks)


def test_counts_survive_every_change_and_a_reopening(maps):
    rng = random.Random(6)
    model: Counter[int] = Counter()
    for step in range(4000):
        block = rng.randrange(300) * 130
        if model[block] and rng.random() < 0.4:
            model[block] -= 1
            assert maps.data.dec(block) == model[block]
        else:
            model[block] += 1
            maps.data.inc(block)
        if step % 37 == 0:
            maps.data.flush_overflow()
        if step % 500 == 499:
            maps.data.release(maps.commit())
            maps.reopen()
    assert max(model.values()) > 5
    assert {block: maps.data.count(block) for block in model} == dict(model)
    assert maps.data.nr_allocated == sum(1 for count in model.values() if count)


def test_counts_of_metadata_blocks_above_two(maps):
    block = maps.tm.allocate()
    for _ in range(9):
        maps.metadata.inc(block)
    maps.commit()
    maps.reopen()
    assert maps.metadata.count(block) == 10
    for left in range(9, -1, -1):
        assert maps.metadata.dec(block) == left
    maps.commit()
    maps.reopen()
    assert maps.metadata.count(block) == 0


def test_growth_inside_a_bitmap_and_beyond(maps):
    maps.data.allocate_many(40_000)
    maps.commit()
    maps.data.grow(40_010)
    assert maps.data.allocate_many(10) == list(range(40_000, 40_010))
    maps.data.grow(100_000)
    assert maps.data.allocate() == 40_010
    maps.commit()
    maps.reopen()
    assert maps.data.nr_blocks == 100_000
    assert maps.data.nr_free == 100_000 - 40_011
    assert maps.data.allocate() == 40_011


def test_growth_of_metadata(maps):
    maps.device.nr_blocks = ENTRIES_PER_BITMAP + 500
    while maps.metadata.nr_allocatable > 20:
        maps.tm.allocate()
    maps.metadata.grow(ENTRIES_PER_BITMAP + 500)
    used = maps.metadata.nr_allocated
    maps.commit()
    maps.reopen()
    assert maps.metadata.nr_blocks == ENTRIES_PER_BITMAP + 500
    assert used <= maps.metadata.nr_allocated <= used + 4


@pytest.mark.parametrize("block", [40_000, 2**40, -1])
def test_a_block_that_the_device_does_not_have_is_a_format_error(maps, block):
    for act in (maps.data.count, maps.data.inc, maps.data.dec):
        with pytest.raises(FormatError, match="data block number"):
            act(block)


def test_letting_go_of_a_free_block_is_a_format_error(maps):
    with pytest.raises(FormatError, match="reference count of the data block"):
        maps.data.dec(7)


def test_memory_is_bounded_while_many_bitmaps_change() -> None:
    maps = Maps(nr_metadata=4000, nr_data=ENTRIES_PER_BITMAP * 1200)
    for index in range(1200):
        maps.data.inc(index * ENTRIES_PER_BITMAP + 5)
        maps.data.trim()
    assert maps.data.nr_dirty_bitmaps <= 256
    maps.commit()
    maps.data.trim()
    assert len(maps.data._bitmaps) <= 512
    maps.reopen()
    assert all(maps.data.count(n * ENTRIES_PER_BITMAP + 5) == 1 for n in range(1200))
