"""Full pools and failing devices: who waits, who is refused, what stays on disk."""

import errno
import functools
import os
import time

import pytest

from devmapper.engine.embedded.data_file import DataFile
from devmapper.engine.embedded.pool import EmbeddedPool, ThinDevice
from devmapper.engine.port import PoolMode
from devmapper.errors import PoolFull, PoolMismatch, PoolUnusable, Space
from devmapper.thin.blocks import FileDevice
from devmapper.units import Bytes, ThinId, TransactionId
from tests.support.pools import (
    BLOCK,
    ONE,
    SIZE,
    THREE,
    TWO,
    Background,
    FaultyMetadataDevice,
    Rig,
    assert_clean,
    fill,
    make_table,
    raises_errno,
    read,
    used,
    write,
)


def create_many(pool: EmbeddedPool) -> None:
    for thin_id in range(10, 10000):
        pool.create_thin(ThinId(thin_id))


class TestFullPool:
    def test_error_at_once_if_asked_for(self, table):
        with EmbeddedPool.open(table._replace(error_if_no_space=True)) as pool:
            device, end = fill(pool, ONE)
            for _ in range(2):
                with raises_errno(errno.ENOSPC):
                    write(device, end, b"x")
            assert pool.status().mode is PoolMode.OUT_OF_DATA_SPACE
            write(device, 0, b"in place")
            assert read(device, 0, 8) == b"in place"
        assert_clean(table)

    def test_writes_give_up_after_the_timeout(self, table):
        with EmbeddedPool.open(table, no_space_timeout=0.3) as pool:
            device, end = fill(pool, ONE)
            begin = time.monotonic()
            with raises_errno(errno.ENOSPC):
                write(device, end, b"x")
            assert time.monotonic() - begin > 0.25
            for _ in range(2000):  # later ones do not wait, or they would take ten minutes
                with raises_errno(errno.ENOSPC):
                    write(device, end, b"x")
        assert_clean(table)

    def test_resizing_wakes_them(self, table, pool):
        device, end = fill(pool, ONE)
        waiting = [
            Background(functools.partial(write, device, end + n * BLOCK, b"x" * 512))
            for n in range(4)
        ]
        assert all(call.is_running() for call in waiting)
        assert pool.status().mode is PoolMode.OUT_OF_DATA_SPACE
        larger = table._replace(data_size=Bytes(table.data_size + 64 * BLOCK))
        with pytest.raises(PoolMismatch):
            pool.resize(larger)
        os.truncate(table.data_device, larger.data_size)
        pool.resize(larger)
        for call in waiting:
            call.result()
        assert pool.status().mode is PoolMode.WRITE
        assert pool.status().total_data_blocks == 256 + 64
        assert read(device, end, 512) == b"x" * 512

    def test_deleting_wakes_them(self, table):
        with EmbeddedPool.open(table, commit_period=3600) as pool:  # no commit comes to help
            pool.create_thin(TWO)
            device, _ = fill(pool, ONE)
            pool.create_snap(THREE, TWO)
            other = pool.open_device(TWO, SIZE)
            waiting = Background(lambda: write(other, 0, b"x" * 512))
            assert waiting.is_running()
            device.close()
            pool.delete(ONE)
            waiting.result()
            assert pool.status().mode is PoolMode.WRITE
        assert_clean(table)

    def test_discarding_wakes_them(self, pool):
        device, end = fill(pool, ONE)
        waiting = Background(lambda: write(device, end, b"x" * 512))
        assert waiting.is_running()
        device.discard(0, 4 * BLOCK)
        waiting.result()
        assert read(device, 0, 512) == bytes(512)

    def test_freed_blocks_that_are_not_committed_are_found_first(self, table):
        with EmbeddedPool.open(table, commit_period=3600, no_space_timeout=3600) as pool:
            device, end = fill(pool, ONE)
            device.discard(0, BLOCK)
            write(device, end, b"x" * 512)
            assert pool.status().mode is PoolMode.WRITE
        assert_clean(table)

    def test_a_long_write_fills_what_is_left(self, table):
        with EmbeddedPool.open(table._replace(error_if_no_space=True)) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, Bytes(300 * BLOCK))
            with raises_errno(errno.ENOSPC):
                write(device, 0, b"y" * (300 * BLOCK))
            assert read(device, 0, 256 * BLOCK) == b"y" * (256 * BLOCK)
            assert used(pool) == 256
        assert_clean(table)

    def test_a_queued_write_stops_neither_suspending_nor_snapshots(self, pool):
        device, end = fill(pool, ONE)
        waiting = Background(lambda: write(device, end, b"x" * 512))
        assert waiting.is_running()
        pool.create_snap(TWO, ONE)
        device.suspend()
        device.resume()
        device.close()
        with raises_errno(errno.EIO):
            waiting.result()

    def test_low_water(self, tmp_path, caplog):
        table = make_table(tmp_path, low_water_mark=100)
        with EmbeddedPool.open(table) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, Bytes(256 * BLOCK))
            write(device, 0, bytes(156 * BLOCK))
            assert not pool.status().low_water_reached
            for block in range(156, 160):
                write(device, block * BLOCK, bytes(512))
            assert pool.status().low_water_reached
            assert sum("low-water" in record.message for record in caplog.records) == 1
            device.discard(0, 64 * BLOCK)
            pool.commit()
            pool._core.quarantine.drain()
            assert not pool.status().low_water_reached

    def test_a_mark_above_the_pool_is_never_reached(self, tmp_path):
        with EmbeddedPool.open(make_table(tmp_path, low_water_mark=32768)) as pool:
            pool.create_thin(ONE)
            write(pool.open_device(ONE, SIZE), 0, bytes(BLOCK))
            assert not pool.status().low_water_reached

    def test_full_metadata_refuse_and_stay_whole(self, table):
        """Nothing of a refused change is done, and what is there can be removed."""
        with EmbeddedPool.open(table) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, Bytes(256 * BLOCK))
            write(device, 0, b"x" * 512)
            with pytest.raises(PoolFull) as full:
                create_many(pool)
            assert full.value.kind is Space.METADATA
            with raises_errno(errno.ENOSPC):
                write(device, BLOCK, b"x" * 512)
            write(device, 0, b"y" * 512)
            device.flush()
            status = pool.status()
            assert (status.mode, status.used_data_blocks) == (PoolMode.WRITE, 1)
            device.discard(0, BLOCK)
            for thin_id in pool.thin_ids()[1:100]:
                pool.delete(thin_id)
            write(device, BLOCK, b"x" * 512)  # commits first
            assert read(device, 0, 2 * BLOCK) == bytes(BLOCK) + b"x" * 512 + bytes(BLOCK - 512)
        assert_clean(table)


class TestFailures:
    def test_full_disk_below_the_data_file(self, rig):
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        write(device, 0, b"a" * 512)
        rig.data.write_error = errno.ENOSPC
        for offset in (0, BLOCK, 5 * BLOCK):
            with raises_errno(errno.ENOSPC):
                write(device, offset, b"b" * 512)
        rig.data.write_error = 0
        assert rig.pool.status().mode is PoolMode.WRITE
        assert read(device, BLOCK, 512) == bytes(512)
        write(device, BLOCK, b"b" * 512)
        rig.pool.commit()
        assert used(rig.pool) == 2
        assert_clean(rig.table)

    def test_data_that_cannot_be_synced_are_never_committed(self, rig):
        rig.pool.create_thin(ONE)
        rig.pool.commit()
        device = rig.pool.open_device(ONE, SIZE)
        write(device, 0, b"a" * 512)
        rig.data.sync_error = errno.EIO
        with raises_errno(errno.EIO):
            device.flush()
        rig.data.sync_error = 0
        assert read(device, 0, 512) == bytes(512)  # as of the last commit
        self.expect_read_only(rig, device)

    def test_a_failed_commit(self, rig):
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        write(device, 0, b"a" * 512)
        device.flush()
        write(device, 0, b"b" * 512)
        write(device, BLOCK, b"b" * 512)
        rig.device.broken = True
        with raises_errno(errno.EIO):
            device.flush()
        rig.device.broken = False
        assert read(device, 0, 512) == b"b" * 512
        assert read(device, BLOCK, 512) == bytes(512)
        self.expect_read_only(rig, device)

    def expect_read_only(self, rig: Rig, device: ThinDevice) -> None:
        status = rig.pool.status()
        assert (status.mode, status.needs_check) == (PoolMode.READ_ONLY, True)
        for call in (
            functools.partial(write, device, 0, b"x"),
            functools.partial(write, device, 9 * BLOCK, b"x"),
            functools.partial(device.discard, 0, BLOCK),
            functools.partial(device.write_zeroes, 0, 512),
            device.flush,  # a later flush does not say that all is well
        ):
            with raises_errno(errno.EIO):
                call()
        for call in (
            lambda: rig.pool.create_thin(TWO),
            lambda: rig.pool.delete(THREE),
            lambda: rig.pool.set_transaction_id(TransactionId(0), TransactionId(1)),
            rig.pool.commit,
        ):
            with pytest.raises(PoolUnusable) as refused:
                call()
            assert refused.value.mode == "ro"
        rig.close()
        assert_clean(rig.table)
        with EmbeddedPool.open(rig.table) as pool:
            assert pool.status().mode is PoolMode.READ_ONLY
            reopened = pool.open_device(ONE, SIZE)
            read(reopened, 0, 512)
            with raises_errno(errno.EROFS):
                write(reopened, 0, b"x")

    def test_queued_writes_learn_of_the_failure(self, rig):
        device, end = fill(rig.pool, ONE)
        waiting = Background(lambda: write(device, end, b"x"))
        assert waiting.is_running()
        rig.device.broken = True
        with pytest.raises(PoolUnusable):
            rig.pool.set_transaction_id(TransactionId(0), TransactionId(1))
        with raises_errno(errno.EIO):
            waiting.result()
        rig.device.broken = False

    def test_metadata_that_cannot_be_read_back(self, rig):
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        rig.device.broken = rig.device.unreadable = True
        rig.device.spares_superblock = False
        with pytest.raises(PoolUnusable):
            rig.pool.commit()
        assert rig.pool.status().mode is PoolMode.FAIL
        with raises_errno(errno.EIO):
            read(device, 0, 512)
        with pytest.raises(PoolUnusable):
            rig.pool.thin_ids()
        rig.device.broken = rig.device.unreadable = False

    def test_metadata_read_errors_reach_the_reader_alone(self, table):
        with EmbeddedPool.open(table) as pool:
            pool.create_thin(ONE)
            write(pool.open_device(ONE, SIZE), 0, os.urandom(SIZE))
        device = FaultyMetadataDevice(FileDevice.open(table.metadata_device))
        rig = Rig(table, DataFile.open(table.data_device), device)
        thin = rig.pool.open_device(ONE, SIZE)
        rig.pool._core.metadata._metadata._tm._cache.clear()
        device.unreadable = True
        with raises_errno(errno.EIO):
            read(thin, 0, 512)
        device.unreadable = False
        assert rig.pool.status().mode is PoolMode.WRITE
        read(thin, 0, 512)
        rig.close()
