"""What thin-provisioning-tools say to metadata that we wrote, and we to theirs."""

import os
import random
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from devmapper.thin.blocks import FileDevice
from devmapper.thin.metadata import PoolMetadata
from devmapper.units import Bytes, ThinId
from tests.support.audit import Audit
from tests.support.thin_tools import thin_check, thin_dump, thin_ls, thin_restore

Thins = dict[int, dict[int, tuple[int, int]]]  # thin id: block: data block, time
Details = tuple[int, ...]
Contents = tuple[Details, dict[int, tuple[Details, dict[int, tuple[int, int]]]]]

pytestmark = pytest.mark.tools

BLOCK = Bytes(64 * 1024)
MIB = 256  # metadata blocks


class Pool:
    """A pool on a file, looked at by every oracle when it is left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rng = random.Random(path.name)

    def make(self, *, nr_metadata: int, nr_data: int) -> PoolMetadata:
        self.path.touch()
        os.truncate(self.path, nr_metadata * 4096)
        device = FileDevice.open(self.path)
        self.md = PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=nr_data)
        return self.md

    def map_new(self, thin_id: ThinId, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        data = self.md.allocate_data_blocks(len(blocks))
        self.md.insert_many(thin_id, list(zip(blocks, data, strict=True)))

    def check(self) -> None:
        """Commit, then thin_check, the audit, and thin_dump against our own reading."""
        self.md.release_data_blocks(self.md.commit())
        checked = thin_check(self.path)
        assert checked, checked.output
        with FileDevice.open(self.path, read_only=True) as device:
            audit = Audit(device)
        dumped = read_dump(thin_dump(self.path))
        assert dumped == ours(self.md)
        assert {thin_id: set(blocks) for thin_id, blocks in audit.contents.items()} == {
            thin_id: set(blocks) for thin_id, (_, blocks) in dumped[1].items()
        }


def read_dump(text: str) -> Contents:
    """thin_dump's XML: fields of the superblock, then details and mappings by thin id."""
    root = ET.fromstring(text)

    def number(tag: ET.Element, name: str) -> int:
        return int(tag.attrib[name])

    thins = {}
    for device in root:
        blocks = {}
        for mapping in device:
            time = number(mapping, "time")
            if mapping.tag == "single_mapping":
                blocks[number(mapping, "origin_block")] = number(mapping, "data_block"), time
                continue
            begin, data = number(mapping, "origin_begin"), number(mapping, "data_begin")
            for n in range(number(mapping, "length")):
                blocks[begin + n] = data + n, time
        names = ("mapped_blocks", "transaction", "creation_time", "snap_time")
        details = tuple(number(device, name) for name in names)
        thins[number(device, "dev_id")] = details, blocks
    names = ("time", "transaction", "data_block_size", "nr_data_blocks")
    return tuple(number(root, name) for name in names), thins


def ours(md: PoolMetadata) -> Contents:
    thins: dict[int, tuple[Details, dict[int, tuple[int, int]]]] = {
        thin_id: (tuple(md.details(thin_id)), dict(md.find_range(thin_id, 0, 2**63)))
        for thin_id in md.thin_ids()
    }
    return (md.time, md.transaction_id, md.data_block_size // 512, md.nr_data_blocks), thins


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path / "metadata")
    yield pool
    pool.md.close()


def test_an_empty_pool(pool):
    pool.make(nr_metadata=128, nr_data=1)
    pool.check()


def test_deep_trees(pool):
    md = pool.make(nr_metadata=16 * MIB, nr_data=400_000)
    md.create_thin(1)
    pool.map_new(1, range(0, 400_000, 2))
    pool.check()
    md.create_snap(2, 1)
    for _ in range(200):
        thin_id, begin = pool.rng.choice((1, 2)), pool.rng.randrange(400_000)
        pool.map_new(thin_id, range(begin, begin + pool.rng.choice((1, 16, 200))))
    pool.check()
    md.remove_range(1, 1000, 399_000)
    md.remove_range(2, 100_000, 300_000)
    pool.check()
    md.delete(1)
    pool.check()


def test_random_single_blocks(pool):
    md = pool.make(nr_metadata=8 * MIB, nr_data=100_000)
    md.create_thin(1)
    for block in pool.rng.sample(range(10**9), 20_000):
        md.insert(1, block, md.allocate_data_block())
    pool.check()
    for block, _ in list(md.find_range(1, 0, 10**9))[::3]:
        assert md.remove(1, block)
    pool.check()


def test_a_thousand_thins(pool):
    md = pool.make(nr_metadata=16 * MIB, nr_data=100_000)
    for thin_id in pool.rng.sample(range(2**24), 1000):
        md.create_thin(thin_id)
        pool.map_new(thin_id, range(thin_id % 50, thin_id % 50 + 10))
    pool.check()
    for thin_id in pool.rng.sample(md.thin_ids(), 700):
        md.delete(thin_id)
    pool.check()
    for thin_id in md.thin_ids():
        md.delete(thin_id)
    pool.check()
    assert md.nr_free_data_blocks == md.nr_data_blocks


@pytest.mark.parametrize("snapshots", [1, 2, 3, 50])
def test_counts_above_two_and_three(pool, snapshots):
    md = pool.make(nr_metadata=8 * MIB, nr_data=50_000)
    md.create_thin(0)
    pool.map_new(0, range(2000))
    for thin_id in range(1, snapshots + 1):
        md.create_snap(thin_id, pool.rng.choice(md.thin_ids()))
    pool.check()
    for thin_id in md.thin_ids():  # one block in each leaf: every leaf becomes its own
        for block in range(0, 2000, 150):
            md.insert(thin_id, block, md.allocate_data_block())
    pool.check()
    assert md.data_ref_count(md.find(0, 7).data_block) == snapshots + 1
    for thin_id in pool.rng.sample(md.thin_ids(), snapshots):
        md.delete(thin_id)
        md.commit()
    pool.check()


def test_a_chain_of_snapshots_like_layers_of_an_image(pool):
    md = pool.make(nr_metadata=8 * MIB, nr_data=50_000)
    md.create_thin(0)
    pool.map_new(0, range(500))
    for thin_id in range(1, 100):
        md.create_snap(thin_id, thin_id - 1)
        begin = pool.rng.randrange(3000)
        pool.map_new(thin_id, range(begin, begin + 40))
        md.set_transaction_id(md.transaction_id, md.transaction_id + 1)
        md.commit()
    pool.check()
    for thin_id in range(0, 99, 3):
        md.delete(thin_id)
    pool.check()


def test_a_held_metadata_snap(pool):
    md = pool.make(nr_metadata=8 * MIB, nr_data=50_000)
    for thin_id in range(300):
        md.create_thin(thin_id)
        pool.map_new(thin_id, range(20))
    md.reserve_metadata_snap()
    pool.check()
    before = read_dump(thin_dump(pool.path, "-m"))
    for thin_id in range(0, 300, 2):
        pool.map_new(thin_id, range(10, 30))
    for thin_id in range(1, 300, 6):
        md.delete(thin_id)
    md.create_snap(1000, 2)
    pool.check()
    assert read_dump(thin_dump(pool.path, "-m")) == before
    md.release_metadata_snap()
    pool.check()


def test_growth_of_both_devices(pool):
    md = pool.make(nr_metadata=200, nr_data=1000)
    md.create_thin(1)
    pool.map_new(1, range(1000))
    pool.check()
    os.truncate(pool.path, 20_000 * 4096)
    md.resize_metadata(20_000)
    md.resize_data(200_000)
    pool.check()
    pool.map_new(1, range(1000, 100_000))
    pool.check()
    assert md.nr_metadata_blocks == 20_000


def test_the_flag_needs_check(pool):
    md = pool.make(nr_metadata=128, nr_data=1000)
    md.set_needs_check(needs_check=True)
    assert 'flags="1"' in thin_dump(pool.path)
    with PoolMetadata.open(FileDevice.open(pool.path)) as again:
        assert again.needs_check
    md.set_needs_check(needs_check=False)
    pool.check()


def write_xml(path: Path, thins: Thins, *, nr_data: int) -> None:
    lines = [
        '<superblock uuid="" time="5" transaction="9" version="2" data_block_size="128"',
        f' nr_data_blocks="{nr_data}">',
    ]
    for thin_id, blocks in thins.items():
        lines.append(
            f'<device dev_id="{thin_id}" mapped_blocks="{len(blocks)}" transaction="{thin_id}"'
            f' creation_time="1" snap_time="{thin_id % 3}">'
        )
        lines += [
            f'<single_mapping origin_block="{block}" data_block="{data}" time="{when}"/>'
            for block, (data, when) in sorted(blocks.items())
        ]
        lines.append("</device>")
    path.write_text("\n".join([*lines, "</superblock>"]))


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[tuple[Path, PoolMetadata, Thins]]:
    """Metadata that thin_restore made: a pool, and what is in it."""
    rng = random.Random(8)
    thins = {
        thin_id: {
            block: (rng.randrange(5000), rng.randrange(5))
            for block in rng.sample(range(100_000), rng.choice((0, 1, 300, 3000)))
        }
        for thin_id in rng.sample(range(10_000), 40)
    }
    path = tmp_path / "restored"
    path.touch()
    os.truncate(path, 4096 * 4096)
    write_xml(tmp_path / "xml", thins, nr_data=20_000)
    thin_restore(tmp_path / "xml", path)
    with PoolMetadata.open(FileDevice.open(path)) as md:
        yield path, md, thins


def test_metadata_of_thin_restore_is_read_back_equal(restored):
    path, md, thins = restored
    superblock, found = ours(md)
    assert superblock == (5, 9, 128, 20_000)
    assert {thin_id: blocks for thin_id, (_, blocks) in found.items()} == thins
    assert (superblock, found) == read_dump(thin_dump(path))
    users: dict[int, int] = {}
    for blocks in thins.values():
        for data, _ in blocks.values():
            users[data] = users.get(data, 0) + 1
    assert {block: md.data_ref_count(block) for block in users} == users
    assert md.nr_free_data_blocks == 20_000 - len(users)


def test_metadata_of_thin_restore_can_be_changed(restored):
    path, md, thins = restored
    large = [thin_id for thin_id, blocks in thins.items() if len(blocks) > 1000]
    md.create_snap(20_000, large[0])
    for block in range(0, 100_000, 999):
        md.insert(20_000, block, md.allocate_data_block())
        md.insert(large[0], block + 1, md.allocate_data_block())
    md.remove_range(large[1], 20_000, 80_000)
    md.delete(large[2])
    md.resize_data(30_000)
    md.commit()
    checked = thin_check(path)
    assert checked, checked.output
    assert read_dump(thin_dump(path)) == ours(md)
    for thin_id in md.thin_ids():
        md.delete(thin_id)
    md.commit()
    assert thin_check(path)
    assert md.nr_free_data_blocks == 30_000


def test_thin_ls_lists_what_we_list(pool):
    md = pool.make(nr_metadata=512, nr_data=1000)
    md.create_thin(7)
    pool.map_new(7, range(60))
    md.create_snap(9, 7)
    pool.map_new(9, range(10))
    pool.check()
    rows = [line.split() for line in thin_ls(pool.path, "--no-headers").splitlines()]
    assert [int(row[0]) for row in rows] == md.thin_ids()


def test_reading_changes_nothing(pool):
    md = pool.make(nr_metadata=512, nr_data=1000)
    md.create_thin(7)
    pool.map_new(7, range(60))
    pool.check()
    before = pool.path.read_bytes()
    with PoolMetadata.open(FileDevice.open(pool.path, read_only=True), read_only=True) as again:
        assert ours(again) == ours(md)
        assert again.commit() == []
    assert pool.path.read_bytes() == before
