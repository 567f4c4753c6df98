"""Power fails during a commit: the pool is at the commit before or at the one after, and whole."""

import random

import pytest

from devmapper import errors
from devmapper.thin import format as layout
from devmapper.thin.blocks import MemoryDevice
from devmapper.thin.metadata import PoolMetadata, is_blank
from devmapper.units import Bytes, ThinId, TransactionId
from tests.support.audit import Audit
from tests.support.recording import Image, RecordingDevice, crash_images, save
from tests.support.thin_tools import thin_check

BLOCK = Bytes(64 * 1024)
NR_BLOCKS = 512

Groups = list[list[tuple[int, bytes]]]


def state(image: Image) -> tuple[object, ...]:
    """What a reader finds; the audit raises where anything is inconsistent."""
    device = RecordingDevice.of(image, NR_BLOCKS)
    audit = Audit(device)
    with PoolMetadata.open(device, data_block_size=BLOCK) as pool:
        return audit.contents, audit.details, pool.transaction_id, pool.held_root


def change(pool: PoolMetadata, rng: random.Random, step: int) -> None:
    thins = pool.thin_ids()
    origin = rng.choice(thins)
    blocks = sorted(rng.sample(range(2000), rng.choice([1, 30, 300])))
    data = pool.allocate_data_blocks(len(blocks))
    pool.insert_many(origin, list(zip(blocks, data, strict=True)))
    if step % 2:
        pool.create_snap(ThinId(max(thins) + 1), origin)
    if step % 3 == 2:
        pool.remove_range(rng.choice(thins), 500, 900)
    if step % 5 == 4 and len(thins) > 2:
        pool.delete(thins[0])
    if step == 6:
        pool.reserve_metadata_snap()
    if step == 9:
        pool.release_metadata_snap()
    pool.set_transaction_id(pool.transaction_id, TransactionId(pool.transaction_id + 1))


@pytest.fixture(scope="module")
def history() -> list[tuple[Image, Groups, Image]]:
    """Per commit: the image before, the groups of writes, and the image after."""
    rng = random.Random(11)
    device = RecordingDevice(NR_BLOCKS)
    pool = PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=9000)
    pool.create_thin(ThinId(1))
    pool.commit()
    commits = []
    for step in range(12):
        before, device.groups = device.image(), [[]]
        change(pool, rng, step)
        pool.release_data_blocks(pool.commit())
        commits.append((before, device.groups, device.image()))
    return commits


def test_every_crash_leaves_the_state_before_or_after(history):
    seen = set()
    for number, (before, groups, after) in enumerate(history):
        # A step may hold two commits: the metadata snap makes one of its own.
        allowed = [state(before), state(after)]
        durable = dict(before)
        for group in groups:
            durable.update(group)
            allowed.append(state(durable))
        for image in crash_images(before, groups, seed=number, subsets=12):
            found = state(image)
            assert found in allowed
            seen.add((number, found == allowed[0]))
    assert len(seen) == 2 * len(history)


@pytest.mark.tools
def test_thin_check_finds_nothing_after_any_crash(history, tmp_path):
    path = tmp_path / "metadata"
    for number, (before, groups, _) in enumerate(history[5:10]):
        for image in crash_images(before, groups, seed=number, subsets=3):
            path.write_bytes(save(image, NR_BLOCKS))
            checked = thin_check(path)
            assert checked, checked.output


def test_a_recovered_pool_goes_on(history):
    before, groups, _ = history[4]
    for image in crash_images(before, groups, seed=3, subsets=10):
        device = RecordingDevice.of(image, NR_BLOCKS)
        pool = PoolMetadata.open(device)
        change(pool, random.Random(1), 3)
        pool.commit()
        Audit(device)


def test_a_crash_while_formatting_leaves_a_blank_device_or_a_pool() -> None:
    device = RecordingDevice(NR_BLOCKS)
    PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=9000)
    kinds = set()
    for image in crash_images({}, device.groups, seed=1, subsets=20):
        blank = is_blank(RecordingDevice.of(image, NR_BLOCKS))
        kinds.add(blank)
        assert blank or state(image)[0] == {}
    assert kinds == {True, False}


GROWN_BLOCKS = 2 * layout.ENTRIES_PER_BITMAP + 300  # three bitmaps of metadata instead of one


def fill(pool: PoolMetadata, rng: random.Random) -> None:
    while True:
        change(pool, rng, 1)
        pool.release_data_blocks(pool.commit())


@pytest.fixture(scope="module")
def growth() -> tuple[Image, Groups, Image]:
    """A pool whose metadata are as good as full grows by both devices and is used at once."""
    rng = random.Random(7)
    device = RecordingDevice(200)
    pool = PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=9000)
    pool.create_thin(ThinId(1))
    with pytest.raises(errors.PoolFull, match="metadata"):
        fill(pool, rng)
    pool.abort()
    device.nr_blocks = GROWN_BLOCKS
    before, device.groups = device.image(), [[]]
    pool.resize_metadata(GROWN_BLOCKS)
    pool.resize_data(40_000)
    for step in (1, 3, 4, 5):
        change(pool, rng, step)
    pool.commit()
    return before, device.groups, device.image()


def grown_state(image: Image) -> tuple[object, ...]:
    device = RecordingDevice.of(image, GROWN_BLOCKS)
    audit = Audit(device)
    with PoolMetadata.open(device, data_block_size=BLOCK) as pool:
        sizes = pool.nr_metadata_blocks, pool.nr_data_blocks
        return audit.contents, audit.details, pool.transaction_id, sizes


def test_a_crash_amid_growth_leaves_the_old_size_or_the_new_one(growth):
    before, groups, after = growth
    allowed = [grown_state(before), grown_state(after)]
    assert [found[3] for found in allowed] == [(200, 9000), (GROWN_BLOCKS, 40_000)]
    seen = set()
    for image in crash_images(before, groups, seed=21, subsets=30):
        found = grown_state(image)
        assert found in allowed
        seen.add(found[3])
        device = RecordingDevice.of(image, GROWN_BLOCKS)
        with PoolMetadata.open(device) as pool:  # the next start completes it
            pool.resize_metadata(GROWN_BLOCKS)
            pool.resize_data(40_000)
            change(pool, random.Random(1), 3)
            pool.commit()
            Audit(device)
            assert (pool.nr_metadata_blocks, pool.nr_data_blocks) == (GROWN_BLOCKS, 40_000)
    assert len(seen) == 2


@pytest.mark.tools
def test_growth_changes_nothing_but_the_size_for_the_peers(growth, tmp_path):
    before, groups, after = growth
    path = tmp_path / "metadata"
    for image in (*crash_images(before, groups, seed=2, subsets=2), after):
        path.write_bytes(save(image, GROWN_BLOCKS))
        checked = thin_check(path)
        assert checked, checked.output


class FailingDevice(MemoryDevice):
    """Fails the n-th write or flush from now on, once."""

    countdown = -1

    def _step(self) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            raise OSError(5, "simulated I/O error")

    def write(self, block: int, data: bytes) -> None:
        if block != layout.SUPERBLOCK_LOCATION:
            self._step()
            super().write(block, data)
        else:  # the disk has it, and says it has not
            super().write(block, data)
            self._step()

    def flush(self) -> None:
        self._step()


def test_a_failed_commit_can_be_aborted_wherever_it_failed() -> None:
    rng = random.Random(2)
    device = FailingDevice(NR_BLOCKS)
    pool = PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=9000)
    pool.create_thin(ThinId(1))
    pool.commit()
    for fail_at in range(1, 60):
        before = Audit(device).contents
        change(pool, rng, fail_at % 3)
        device.countdown = fail_at
        try:
            freed = pool.commit()
        except OSError:
            with pytest.raises(errors.PoolUnusable):
                pool.create_thin(ThinId(99))
            with pytest.raises(errors.PoolUnusable):
                pool.commit()
            pool.abort()
            assert Audit(device).contents == before
        else:
            pool.release_data_blocks(freed)
            device.countdown = -1
            break
    else:
        pytest.fail("no commit ever succeeded")
    assert fail_at > 6
    Audit(device)
