"""Copies of pool metadata whose trees are pinned while the pool goes on."""

from pathlib import Path

import pytest

from devmapper.errors import IntegrityError
from devmapper.thin.blocks import FileDevice, MemoryDevice
from devmapper.thin.check import check
from devmapper.thin.copy import copy_pool
from devmapper.thin.ls import ls
from devmapper.thin.metadata import PoolMetadata
from devmapper.thin.walk import open_superblock
from devmapper.units import KIB, Bytes, ThinId, TransactionId
from tests.support import capabilities, thin_tools

BLOCK = Bytes(64 * KIB)
DATA_BLOCKS = 40_000
METADATA_BLOCKS = 2048


def fill(metadata: PoolMetadata, thin_id: int, begin: int, length: int) -> None:
    blocks = metadata.allocate_data_blocks(length)
    metadata.insert_many(
        ThinId(thin_id), list(zip(range(begin, begin + length), blocks, strict=True))
    )


@pytest.fixture
def pool() -> tuple[MemoryDevice, PoolMetadata]:
    """A thin device with snapshots of snapshots, so that nodes and blocks are shared often."""
    device = MemoryDevice(METADATA_BLOCKS)
    metadata = PoolMetadata.format(device, data_block_size=BLOCK, nr_data_blocks=DATA_BLOCKS)
    metadata.create_thin(ThinId(1))
    fill(metadata, 1, 0, 3000)
    for snap in range(2, 12):
        metadata.create_snap(ThinId(snap), ThinId(snap - 1))
        fill(metadata, snap, 100 * snap, 50)
    metadata.create_thin(ThinId(500))
    metadata.set_transaction_id(TransactionId(0), TransactionId(3))
    metadata.release_data_blocks(metadata.commit())
    return device, metadata


def copied(device: MemoryDevice, target: Path, *, metadata_snap: bool) -> FileDevice:
    with target.open("wb") as file:
        file.truncate(METADATA_BLOCKS * 4096)
    copy = FileDevice.open(target)
    copy_pool(device, open_superblock(device, metadata_snap=metadata_snap), copy)
    return copy


def assert_sound(copy: FileDevice, path: Path) -> None:
    report = check(copy)
    assert report.clean, report.damages
    if not capabilities.tools():
        checked = thin_tools.thin_check(path)
        assert checked, checked.output


def test_a_copy_of_the_committed_trees(pool, tmp_path):
    device, _ = pool
    path = tmp_path / "copy"
    with copied(device, path, metadata_snap=False) as copy:
        assert_sound(copy, path)
        assert ls(copy) == ls(device)
    assert path.stat().st_blocks * 512 < METADATA_BLOCKS * 4096


def test_a_copy_of_the_metadata_snap_while_the_pool_goes_on(pool, tmp_path):
    device, metadata = pool
    before = ls(device)
    metadata.release_data_blocks(metadata.reserve_metadata_snap())
    metadata.commit()
    for snap in range(20, 40):
        metadata.create_snap(ThinId(snap), ThinId(1))
        fill(metadata, snap, 0, 300)
        if snap == 20:
            metadata.delete(ThinId(2))
        metadata.release_data_blocks(metadata.commit())
    path = tmp_path / "copy"
    with copied(device, path, metadata_snap=True) as copy:
        assert_sound(copy, path)
        assert ls(copy) == before
        assert open_superblock(copy, metadata_snap=False).held_root == 0


def test_a_copy_is_a_pool_to_go_on_with(pool, tmp_path):
    device, _ = pool
    path = tmp_path / "copy"
    copied(device, path, metadata_snap=False).close()
    with PoolMetadata.open(FileDevice.open(path)) as metadata:
        assert metadata.transaction_id == 3
        metadata.create_snap(ThinId(99), ThinId(11))
        fill(metadata, 99, 0, 500)
        metadata.delete(ThinId(1))
        metadata.commit()
    with FileDevice.open(path, read_only=True) as copy:
        assert_sound(copy, path)


def test_damage_is_not_copied(pool, tmp_path):
    device, metadata = pool
    root = metadata.superblock.data_mapping_root
    device.write(root, b"\xff" * 4096)
    with pytest.raises(IntegrityError):
        copied(device, tmp_path / "copy", metadata_snap=False)
