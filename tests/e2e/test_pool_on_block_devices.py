"""An embedded pool on block devices: loop devices stand for disks."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.engine.embedded.data_file import DataFile
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.port import PoolTable
from devmapper.errors import PoolBusy
from devmapper.linux import blockdev, loop
from devmapper.units import MIB, Bytes, ThinId
from tests.support.pattern import PatternStomper
from tests.support.pools import BLOCK, assert_clean, make_table, raises_errno, read, write

pytestmark = [pytest.mark.root, pytest.mark.fuse]

ONE = ThinId(1)
SIZE = Bytes(4 * MIB)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[PoolTable]:
    table = make_table(tmp_path, skip_block_zeroing=False)
    with (
        loop.attached(table.metadata_device) as metadata,
        loop.attached(table.data_device) as data,
    ):
        yield table._replace(metadata_device=metadata, data_device=data)


def test_snapshots_are_isolated_and_space_comes_back(disks: PoolTable, tmp_path: Path) -> None:
    with EmbeddedPool.open(disks) as pool:
        pool.create_thin(ONE)
        first = PatternStomper(pool.open_device(ONE, SIZE), "1", size=SIZE)
        first.stamp(20)
        pool.create_snap(ThinId(2), ONE)
        second = first.fork(pool.open_device(ThinId(2), SIZE), "2")
        for stomper in (first, second):
            stomper.stamp(10)
            stomper.discard(5)
            stomper.zero(5)
        first.verify()
        second.verify()
        for stomper in (first, second):
            stomper.device.close()
            pool.delete(stomper.device.thin_id)
        assert pool.status().discard_passdown
    assert_clean(disks)
    assert (tmp_path / "data").stat().st_blocks == 0


def test_new_blocks_are_zeroed_on_a_dirty_disk(disks: PoolTable) -> None:
    disks.data_device.write_bytes(b"\xee" * disks.data_size)
    with EmbeddedPool.open(disks) as pool:
        pool.create_thin(ONE)
        device = pool.open_device(ONE, SIZE)
        write(device, 4096, b"x" * 4096)
        assert read(device, 0, BLOCK) == bytes(4096) + b"x" * 4096 + bytes(BLOCK - 8192)


def test_large_ranges_are_zeroed_by_the_device(disks: PoolTable) -> None:
    disks.data_device.write_bytes(b"\xee" * disks.data_size)
    data = DataFile.open(disks.data_device)
    data.zero(BLOCK, 4 * BLOCK)
    data.sync()
    found = bytearray(6 * BLOCK)
    data.read(memoryview(found), 0)
    data.close()
    assert found == b"\xee" * BLOCK + bytes(4 * BLOCK) + b"\xee" * BLOCK


def test_devices_that_are_in_use_are_refused(disks: PoolTable) -> None:
    with EmbeddedPool.open(disks):
        with pytest.raises(PoolBusy):
            EmbeddedPool.open(disks)
        with raises_errno(errno.EBUSY):
            os.close(os.open(disks.data_device, os.O_RDWR | os.O_EXCL))


def test_a_pool_that_the_kernel_uses_is_refused(tmp_path: Path) -> None:
    """An active kernel pool holds its loop devices; the name of the file does not matter."""
    table = make_table(tmp_path)
    other = tmp_path / "other name"
    other.hardlink_to(table.metadata_device)
    with loop.attached(other) as node:
        with blockdev.opened(node, os.O_RDWR | os.O_EXCL), pytest.raises(PoolBusy, match=str(node)):
            EmbeddedPool.open(table)
        EmbeddedPool.open(table).close()
