"""Flushing, committing and suspending in the embedded engine."""

import errno
import os
import threading

import pytest

from devmapper.engine.embedded.data_file import DataFile
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.port import PoolTable
from devmapper.errors import (
    UsageError,
)
from devmapper.thin.blocks import FileDevice
from devmapper.thin.metadata import PoolMetadata
from devmapper.units import MIB
from tests.support.pools import (
    BLOCK,
    ONE,
    SIZE,
    TWO,
    Background,
    assert_clean,
    raises_errno,
    read,
    stop_at,
    write,
)
from tests.support.waiting import wait_for


def mapped_on_disk(table: PoolTable) -> int:
    """Blocks of the device ONE as of the last commit; 0 if it is not there."""
    with FileDevice.open(table.metadata_device, read_only=True) as device:
        committed = PoolMetadata.open(device, read_only=True)
        return committed.mapped_blocks(ONE) if committed.thin_ids() else 0


class TestFlushAndCommit:
    def test_a_flush_commits_what_changed(self, rig):
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        write(device, 0, b"x" * 512)
        before = rig.device.flushes
        device.flush()
        committed = rig.device.flushes
        assert committed > before
        assert rig.data.syncs == 1
        write(device, 0, b"y" * 512)  # in place: data only
        device.flush()
        assert (rig.device.flushes, rig.data.syncs) == (committed, 2)
        device.flush()  # nothing at all
        assert (rig.device.flushes, rig.data.syncs) == (committed, 2)

    def test_flushes_share_rounds(self, rig):
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        rounds = rig.pool._core.commits
        slow, begun = threading.Event(), threading.Event()
        original = rounds._work

        def work():
            begun.set()
            slow.wait(60)
            original()

        rounds._work = work
        first = Background(device.flush)
        assert begun.wait(60)
        others = [Background(device.flush) for _ in range(20)]
        assert all(other.is_running(after=0.01) for other in others)
        slow.set()
        for call in (first, *others):
            call.result()
        assert rounds.rounds == 2

    def test_a_change_is_committed_without_a_flush(self, table):
        with EmbeddedPool.open(table, commit_period=0.05) as pool:
            pool.create_thin(ONE)
            write(pool.open_device(ONE, SIZE), 0, b"x" * 512)
            wait_for(lambda: mapped_on_disk(table) == 1, "not committed")

    def test_no_commit_between_allocation_and_mapping(self, rig):
        """A crash after that commit would leave a block that nothing refers to."""
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        inside, go_on = threading.Event(), threading.Event()
        rig.data.before_write = stop_at(inside, go_on)
        writing = Background(lambda: write(device, 0, b"new"))
        assert inside.wait(60)
        committing = Background(rig.pool.commit)
        assert committing.is_running()
        go_on.set()
        writing.result()
        committing.result()
        assert_clean(rig.table)

    def test_data_of_mappings_made_while_data_are_synced_are_synced_again(self, rig, monkeypatch):
        """Between the sync without the metadata lock and the commit a new block was mapped."""
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        write(device, 0, b"x" * 512)
        original = DataFile.sync

        def sync(data):
            original(data)
            if rig.data.syncs == 1:
                write(device, BLOCK, b"y" * 512)

        monkeypatch.setattr(DataFile, "sync", sync)
        device.flush()
        assert rig.data.syncs == 2
        assert not rig.data.unsynced

    def test_export_is_the_committed_metadata(self, tmp_path, table, pool, device):
        write(device, 0, os.urandom(20 * BLOCK))
        target = tmp_path / "copy"
        pool.export_metadata(target)
        with FileDevice.open(target, read_only=True) as copy:
            assert PoolMetadata.open(copy, read_only=True).mapped_blocks(ONE) == 20
        assert_clean(table._replace(metadata_device=target))
        assert target.stat().st_size == table.metadata_device.stat().st_size
        assert target.stat().st_blocks * 512 < MIB * 2
        with pytest.raises(UsageError):
            pool.export_metadata(table.metadata_device)


class TestSuspend:
    def test_io_waits_and_goes_on(self, device):
        write(device, 0, b"before")
        device.suspend()
        calls = [
            Background(lambda: write(device, 0, b"after!")),
            Background(lambda: read(device, 0, 512)),
            Background(device.flush),
            Background(lambda: device.discard(BLOCK, BLOCK)),
        ]
        assert all(call.is_running(after=0.05) for call in calls)
        device.resume()
        for call in calls:
            call.result()
        assert read(device, 0, 6) == b"after!"

    def test_it_waits_for_io_under_way_and_commits(self, rig):
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        inside, go_on = threading.Event(), threading.Event()
        rig.data.before_write = stop_at(inside, go_on)
        writing = Background(lambda: write(device, 0, b"x" * 512))
        assert inside.wait(60)
        suspending = Background(device.suspend)
        assert suspending.is_running()
        go_on.set()
        writing.result()
        suspending.result()
        with FileDevice.open(rig.table.metadata_device, read_only=True) as metadata:
            assert PoolMetadata.open(metadata, read_only=True).mapped_blocks(ONE) == 1
        device.resume()

    def test_a_suspended_origin_can_be_snapshotted(self, pool, device):
        write(device, 0, b"x" * 512)
        device.suspend()
        pool.create_snap(TWO, ONE)
        blocked = Background(lambda: write(device, 0, b"y" * 512))
        assert blocked.is_running()
        device.resume()
        blocked.result()
        assert read(pool.open_device(TWO, SIZE), 0, 512) == b"x" * 512

    def test_closing_refuses_what_waits(self, device):
        device.suspend()
        call = Background(lambda: write(device, 0, b"x"))
        assert call.is_running()
        device.close()
        device.close()
        with raises_errno(errno.EIO):
            call.result()
        with raises_errno(errno.EIO):
            read(device, 0, 1)
