"""What every engine must do: one suite, a function of a factory.

A subclass names the engine (`make_engine`) and, where an engine needs block devices instead of
files, how to make one (`backing`).  After every pool that was deactivated the metadata are given
to `thin_check`.
"""

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from devmapper.deviceset.origin import quiesced
from devmapper.engine.port import (
    Activation,
    Engine,
    Outcome,
    PoolMode,
    PoolTable,
    ThinPool,
)
from devmapper.errors import (
    DevmapperError,
    PoolMismatch,
    ThinBusy,
    ThinIdExists,
    ThinIdMissing,
    TransactionConflict,
    UsageError,
)
from devmapper.linux import blockdev, mount, process
from devmapper.units import KIB, MIB, Bytes, ThinId, TransactionId
from tests.support import capabilities
from tests.support.waiting import wait_for

BLOCK = Bytes(64 * KIB)
SIZE = Bytes(64 * MIB)
DATA_SIZE = Bytes(512 * MIB)
METADATA_SIZE = Bytes(8 * MIB)
XFS_SIZE = Bytes(320 * MIB)  # mkfs.xfs refuses less than 300 MiB

ORIGIN = ThinId(1)
SNAP = ThinId(2)


def check_metadata(table: PoolTable) -> None:
    """The oracle: thin_check has nothing to say."""
    if not capabilities.tools():
        process.run(["thin_check", str(table.metadata_device)])


def write(device: Path, offset: int, data: bytes) -> None:
    """Write to a block device and flush."""
    with blockdev.opened(device, os.O_WRONLY) as fd:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)


def read(device: Path, offset: int, length: int) -> bytes:
    """Read from a block device, not from what the kernel remembers of it."""
    with blockdev.opened(device, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, length, offset)


def make_file_system(kind: str, device: Path) -> None:
    process.run([f"mkfs.{kind}", "-q", str(device)])


@contextmanager
def mounted(device: Path, target: Path, kind: str = "ext4", data: str = "") -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    with mount.mounted_at(device, target, kind, data=data):
        yield target


class EngineSuite:
    """The contract of `devmapper.engine.port`, as tests."""

    NAME = "suite-pool"

    def make_engine(self) -> Engine:
        raise NotImplementedError

    @contextmanager
    def backing(self, file: Path) -> Iterator[Path]:
        """What the engine takes as metadata or data device, made from a sparse file."""
        yield file

    def grow(self, device: Path, size: Bytes) -> None:
        """Let what `backing` made have *size* bytes, as the administrator would."""
        os.truncate(device, size)

    def settle(self) -> None:
        """Wait for those who look at every new file system, where there are any."""

    # The pool under test

    @pytest.fixture
    def engine(self, runtime_base: Path) -> Engine:
        return self.make_engine()

    @pytest.fixture
    def table(self, tmp_path: Path) -> Iterator[PoolTable]:
        for name, size in (("metadata", METADATA_SIZE), ("data", DATA_SIZE)):
            (tmp_path / name).touch()
            os.truncate(tmp_path / name, size)
        with (
            self.backing(tmp_path / "metadata") as metadata,
            self.backing(tmp_path / "data") as data,
        ):
            yield PoolTable(metadata, data, DATA_SIZE, BLOCK)

    @pytest.fixture
    def pool(self, engine: Engine, table: PoolTable) -> Iterator[ThinPool]:
        pool = engine.activate_pool(self.NAME, table)
        yield pool
        if engine.find_pool(self.NAME) is not None:
            self.put_away(engine, table)

    def put_away(self, engine: Engine, table: PoolTable) -> None:
        assert engine.deactivate_pool(self.NAME) is Outcome.DONE
        check_metadata(table)

    def reopen(self, engine: Engine, table: PoolTable) -> ThinPool:
        self.put_away(engine, table)
        return engine.activate_pool(self.NAME, table)

    @pytest.fixture
    def origin(self, pool: ThinPool) -> Path:
        """An active thin device."""
        pool.create_thin(ORIGIN)
        return pool.activate("origin", ORIGIN, SIZE)

    @pytest.fixture
    def mounted_origin(self, origin: Path, tmp_path: Path) -> Iterator[Path]:
        """An active thin device with a mounted ext4."""
        make_file_system("ext4", origin)
        with mounted(origin, tmp_path / "mnt") as target:
            self.settle()
            yield target

    # The pool's life

    def test_blank_metadata_become_an_empty_pool(self, pool: ThinPool) -> None:
        status = pool.status()
        assert status.transaction_id == 0
        assert status.used_data_blocks == 0
        assert status.total_data_blocks == DATA_SIZE // BLOCK
        assert status.block_size == BLOCK
        assert 0 < status.used_metadata_blocks < status.total_metadata_blocks
        assert status.total_metadata_blocks == METADATA_SIZE // 4096
        assert status.mode is PoolMode.WRITE
        assert status.held_metadata_root is None
        assert not status.needs_check
        assert not status.error_if_no_space
        assert status.discard_passdown
        assert not status.low_water_reached or DATA_SIZE // BLOCK < 32768
        assert pool.thin_ids() == []
        assert pool.devices() == []

    def test_a_pool_is_found_while_it_is_active(self, engine: Engine, table: PoolTable) -> None:
        assert engine.find_pool(self.NAME) is None
        pool = engine.activate_pool(self.NAME, table)
        found = engine.find_pool(self.NAME)
        assert found is not None
        assert found.name == pool.name == self.NAME
        assert found.table() == pool.table() == table
        self.put_away(engine, table)
        assert engine.find_pool(self.NAME) is None

    def test_activating_twice_gives_the_same_pool(
        self, engine: Engine, pool: ThinPool, table: PoolTable
    ) -> None:
        pool.create_thin(ORIGIN)
        assert engine.activate_pool(self.NAME, table).thin_ids() == [ORIGIN]

    def test_an_active_pool_with_another_table_is_a_mismatch(
        self, engine: Engine, pool: ThinPool, table: PoolTable
    ) -> None:
        other = table._replace(block_size=Bytes(2 * BLOCK))
        with pytest.raises(PoolMismatch, match="block_size"):
            engine.activate_pool(self.NAME, other)
        assert pool.status().block_size == BLOCK

    def test_metadata_with_another_block_size_are_a_mismatch(
        self, engine: Engine, table: PoolTable
    ) -> None:
        engine.activate_pool(self.NAME, table)
        self.put_away(engine, table)
        with pytest.raises(PoolMismatch):
            engine.activate_pool(self.NAME, table._replace(block_size=Bytes(2 * BLOCK)))
        assert engine.find_pool(self.NAME) is None
        check_metadata(table)

    def test_deactivating_a_pool_that_is_not_active(self, engine: Engine) -> None:
        assert engine.deactivate_pool(self.NAME) is Outcome.ALREADY

    def test_a_name_that_no_device_can_have(self, engine: Engine, table: PoolTable) -> None:
        for name in ("", "a/b", "..", "x" * 128):
            with pytest.raises(UsageError):
                engine.activate_pool(name, table)

    def test_features(self, engine: Engine) -> None:
        features = engine.features()
        assert features.name in ("kernel", "embedded")
        assert features.library_version
        assert features.driver_version

    # Thin ids

    def test_create_and_delete(self, pool: ThinPool) -> None:
        pool.create_thin(ORIGIN)
        pool.create_snap(SNAP, ORIGIN)
        assert pool.thin_ids() == [ORIGIN, SNAP]
        pool.delete(ORIGIN)
        assert pool.thin_ids() == [SNAP]

    def test_the_errors_of_thin_ids(self, pool: ThinPool) -> None:
        pool.create_thin(ORIGIN)
        with pytest.raises(ThinIdExists):
            pool.create_thin(ORIGIN)
        with pytest.raises(ThinIdExists):
            pool.create_snap(ORIGIN, ORIGIN)
        with pytest.raises(ThinIdMissing):
            pool.create_snap(SNAP, ThinId(77))
        with pytest.raises(ThinIdMissing) as missing:
            pool.delete(ThinId(77))
        assert missing.value.thin_id == 77
        with pytest.raises(ThinIdMissing):
            pool.thin_status(ThinId(77))
        with pytest.raises(ThinIdMissing):
            pool.activate("none", ThinId(77), SIZE)
        with pytest.raises(UsageError):
            pool.create_thin(ThinId(1 << 24))
        assert pool.thin_ids() == [ORIGIN]
        assert pool.devices() == []

    def test_what_was_created_is_there_after_reactivation(
        self, engine: Engine, pool: ThinPool, table: PoolTable
    ) -> None:
        pool.create_thin(ORIGIN)
        pool.create_snap(SNAP, ORIGIN)
        pool.commit()
        assert self.reopen(engine, table).thin_ids() == [ORIGIN, SNAP]

    def test_transaction_id(self, engine: Engine, pool: ThinPool, table: PoolTable) -> None:
        pool.set_transaction_id(TransactionId(0), TransactionId(5))
        with pytest.raises(TransactionConflict) as conflict:
            pool.set_transaction_id(TransactionId(4), TransactionId(6))
        assert (conflict.value.pool, conflict.value.expected) == (5, 4)
        pool.create_thin(ORIGIN)
        assert pool.status().transaction_id == 5
        again = self.reopen(engine, table)
        assert again.status().transaction_id == 5
        assert again.thin_status(ORIGIN).transaction_id == 5

    def test_thin_status_counts_mapped_blocks(self, pool: ThinPool, origin: Path) -> None:
        assert pool.thin_status(ORIGIN).mapped_blocks == 0
        assert pool.thin_status(ORIGIN).highest_mapped_block is None
        write(origin, 0, b"a" * BLOCK)
        write(origin, 7 * BLOCK, b"b" * BLOCK)
        status = pool.thin_status(ORIGIN)
        assert status.thin_id == ORIGIN
        assert (status.mapped_blocks, status.highest_mapped_block) == (2, 7)
        assert pool.status().used_data_blocks == 2

    # Activation

    def test_an_active_device_is_a_block_device(self, pool: ThinPool, origin: Path) -> None:
        assert blockdev.is_block_device(origin)
        assert blockdev.size(origin) == SIZE
        info = pool.info("origin")
        assert info is not None
        assert (info.name, info.thin_id, info.size, info.path) == ("origin", ORIGIN, SIZE, origin)
        assert info.state is Activation.ACTIVE
        assert info.open_count == 0
        assert pool.devices() == [info]

    def test_activating_twice_gives_the_same_device(self, pool: ThinPool, origin: Path) -> None:
        write(origin, 0, b"kept")
        assert pool.activate("origin", ORIGIN, SIZE) == origin
        assert len(pool.devices()) == 1
        assert read(origin, 0, 4) == b"kept"

    def test_what_was_not_written_reads_as_zeros(self, origin: Path) -> None:
        write(origin, BLOCK, b"x")
        assert read(origin, 0, 4096) == bytes(4096)
        assert read(origin, BLOCK, 4096) == b"x" + bytes(4095)

    def test_data_stay_after_deactivation(
        self, engine: Engine, pool: ThinPool, table: PoolTable, origin: Path
    ) -> None:
        write(origin, 12345 * 512, b"kept" * 1000)
        assert pool.deactivate("origin") is Outcome.DONE
        assert pool.info("origin") is None
        again = pool.activate("origin", ORIGIN, SIZE)
        assert read(again, 12345 * 512, 4000) == b"kept" * 1000
        pool.deactivate("origin")
        pool = self.reopen(engine, table)
        third = pool.activate("other-name", ORIGIN, SIZE)
        assert read(third, 12345 * 512, 4000) == b"kept" * 1000

    def test_deactivating_what_is_not_active(self, pool: ThinPool) -> None:
        assert pool.info("none") is None
        assert pool.deactivate("none") is Outcome.ALREADY
        assert pool.deactivate("none", deferred=True) is Outcome.ALREADY
        assert pool.cancel_deferred("none") is Outcome.ALREADY

    def test_an_active_device_is_not_deleted(self, pool: ThinPool, origin: Path) -> None:
        write(origin, 0, b"kept")
        with pytest.raises(ThinBusy):
            pool.delete(ORIGIN)
        assert read(origin, 0, 4) == b"kept"
        pool.deactivate("origin")
        pool.delete(ORIGIN)
        assert pool.thin_ids() == []

    def test_a_mounted_device_is_busy(self, pool: ThinPool, mounted_origin: Path) -> None:
        info = pool.info("origin")
        assert info is not None
        assert info.open_count == 1
        with pytest.raises(ThinBusy) as busy:
            pool.deactivate("origin")
        assert busy.value.name == "origin"
        assert any(str(mounted_origin) in holder for holder in busy.value.holders)
        (mounted_origin / "file").write_text("still there")
        assert pool.info("origin") == info

    def test_an_open_device_is_busy(self, pool: ThinPool, origin: Path) -> None:
        with blockdev.opened(origin, os.O_RDONLY):
            with pytest.raises(ThinBusy):
                pool.deactivate("origin")
            info = pool.info("origin")
            assert info is not None
            assert info.state is Activation.ACTIVE
        # Whether a plain open counts as a user is the engine's affair
        assert pool.info("origin") == info._replace(open_count=0)
        assert pool.deactivate("origin") is Outcome.DONE

    # Deferred removal

    def test_deferred_removal_waits_for_the_last_user(
        self, pool: ThinPool, origin: Path, tmp_path: Path
    ) -> None:
        make_file_system("ext4", origin)
        with mounted(origin, tmp_path / "mnt") as target:
            assert pool.deactivate("origin", deferred=True) is Outcome.DONE
            info = pool.info("origin")
            assert info is not None
            assert info.state is Activation.LEAVING
            (target / "file").write_text("written while leaving")
            with pytest.raises(ThinBusy):
                pool.delete(ORIGIN)
        wait_for(lambda: pool.info("origin") is None)
        assert pool.deactivate("origin") is Outcome.ALREADY
        again = pool.activate("origin", ORIGIN, SIZE)
        with mounted(again, tmp_path / "mnt") as target:
            assert (target / "file").read_text() == "written while leaving"

    def test_deferred_removal_of_an_idle_device_is_immediate(
        self, pool: ThinPool, origin: Path
    ) -> None:
        assert pool.deactivate("origin", deferred=True) is Outcome.DONE
        assert pool.info("origin") is None
        pool.delete(ORIGIN)

    def test_deferred_removal_can_be_cancelled(
        self, pool: ThinPool, origin: Path, tmp_path: Path
    ) -> None:
        make_file_system("ext4", origin)
        with mounted(origin, tmp_path / "mnt"):
            pool.deactivate("origin", deferred=True)
            assert pool.cancel_deferred("origin") is Outcome.DONE
            info = pool.info("origin")
            assert info is not None
            assert info.state is Activation.ACTIVE
            assert pool.cancel_deferred("origin") is Outcome.ALREADY
        time.sleep(0.2)
        after = pool.info("origin")
        assert after is not None
        assert (after.path, after.state) == (origin, Activation.ACTIVE)
        assert pool.deactivate("origin") is Outcome.DONE

    def test_a_device_that_is_leaving_is_asked_again_to_go(
        self, pool: ThinPool, origin: Path, tmp_path: Path
    ) -> None:
        make_file_system("ext4", origin)
        with mounted(origin, tmp_path / "mnt"):
            for _ in range(2):
                assert pool.deactivate("origin", deferred=True) in (Outcome.DONE, Outcome.ALREADY)
                with pytest.raises(ThinBusy):
                    pool.deactivate("origin")
                info = pool.info("origin")
                assert info is not None
                assert (info.state, info.open_count > 0) == (Activation.LEAVING, True)
        pool.deactivate("origin")
        assert pool.info("origin") is None

    # Suspension and snapshots

    def test_a_snapshot_and_its_origin_go_their_own_ways(
        self, pool: ThinPool, origin: Path
    ) -> None:
        write(origin, 0, b"shared")
        with pool.suspended("origin"):
            pool.create_snap(SNAP, ORIGIN)
        snap = pool.activate("snap", SNAP, SIZE)
        write(origin, 0, b"origin")
        write(snap, 3 * BLOCK, b"snap")
        assert read(snap, 0, 6) == b"shared"
        assert read(origin, 0, 6) == b"origin"
        assert read(origin, 3 * BLOCK, 4) == bytes(4)
        assert read(snap, 3 * BLOCK, 4) == b"snap"

    @pytest.mark.parametrize("kind", ["ext4", "xfs"])
    def test_a_snapshot_of_a_mounted_origin_is_consistent(
        self, pool: ThinPool, tmp_path: Path, kind: str
    ) -> None:
        size = XFS_SIZE if kind == "xfs" else SIZE
        pool.create_thin(ORIGIN)
        origin = pool.activate("origin", ORIGIN, size)
        make_file_system(kind, origin)
        with mounted(origin, tmp_path / "mnt", kind) as target:
            # Never synced: freezing must bring it to the device
            (target / "before").write_bytes(b"before" * 100_000)
            with pool.suspended("origin"):
                pool.create_snap(SNAP, ORIGIN)
            (target / "after").write_bytes(b"after")
        snap = pool.activate("snap", SNAP, size)
        if kind == "ext4":
            process.run(["e2fsck", "-f", "-n", str(snap)])
        options = "nouuid" if kind == "xfs" else ""
        with mounted(snap, tmp_path / "snap", kind, options) as target:
            assert (target / "before").read_bytes() == b"before" * 100_000
            assert not (target / "after").exists()
        if kind == "xfs":  # a frozen xfs keeps its log dirty, for the mount to replay
            process.run(["xfs_repair", "-n", str(snap)])

    def test_a_mount_in_another_namespace_counts(
        self, pool: ThinPool, origin: Path, tmp_path: Path
    ) -> None:
        make_file_system("ext4", origin)
        (tmp_path / "mnt").mkdir()
        script = (
            f"mount -t ext4 {origin} {tmp_path}/mnt && echo never synced > {tmp_path}/mnt/file"
            " && echo mounted && read answer"
        )
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            try:
                assert other.stdout is not None
                assert other.stdout.readline() == "mounted\n"
                assert not mount.is_mount_point(tmp_path / "mnt")
                with pytest.raises(ThinBusy) as busy:
                    pool.deactivate("origin")
                assert any(f"process {other.pid} " in holder for holder in busy.value.holders)
                with pool.suspended("origin"):
                    pool.create_snap(SNAP, ORIGIN)
            finally:
                other.communicate("go\n", timeout=60)
        assert other.returncode == 0
        with mounted(pool.activate("snap", SNAP, SIZE), tmp_path / "mnt") as target:
            assert (target / "file").read_text() == "never synced\n"
        assert pool.deactivate("origin") is Outcome.DONE

    def test_a_snapshot_while_its_origin_comes_and_goes(self, pool: ThinPool, origin: Path) -> None:
        """Whoever has mounted it for a moment puts it when he likes."""
        ended = threading.Event()

        def come_and_go() -> int:
            turns = 0
            while not ended.is_set():
                with suppress(ThinBusy):  # it is suspended, or held for that
                    pool.deactivate("origin")
                with suppress(ThinBusy):
                    pool.activate("origin", ORIGIN, SIZE)
                turns += 1
            return turns

        with ThreadPoolExecutor(1) as threads:
            turns = threads.submit(come_and_go)
            try:
                for _ in range(15):
                    with quiesced(pool, "origin"):
                        pool.create_snap(SNAP, ORIGIN)
                    pool.delete(SNAP)
            finally:
                ended.set()
            assert turns.result() > 2

    def test_writes_wait_while_the_device_is_suspended(
        self, pool: ThinPool, mounted_origin: Path
    ) -> None:
        program = (
            "import os, sys; fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY);"
            "print('start', flush=True); os.write(fd, b'x'); os.fsync(fd); print('done')"
        )
        with pool.suspended("origin"):
            info = pool.info("origin")
            assert info is not None
            assert info.state is Activation.SUSPENDED
            child = subprocess.Popen(
                [sys.executable, "-c", program, mounted_origin / "file"], stdout=subprocess.PIPE
            )
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.5)
        output, _ = child.communicate(timeout=60)
        assert output.endswith(b"done\n")
        info = pool.info("origin")
        assert info is not None
        assert info.state is Activation.ACTIVE

    def test_a_bare_device_is_flushed_by_suspension(self, pool: ThinPool, origin: Path) -> None:
        with blockdev.opened(origin, os.O_WRONLY) as fd:
            os.pwrite(fd, b"in the page cache", 0)
            with pool.suspended("origin"):
                pool.create_snap(SNAP, ORIGIN)
        snap = pool.activate("snap", SNAP, SIZE)
        assert read(snap, 0, 17) == b"in the page cache"

    def test_suspending_what_is_not_active_is_nothing(self, pool: ThinPool) -> None:
        with pool.suspended("none"):
            pool.create_thin(ORIGIN)
        assert pool.thin_ids() == [ORIGIN]

    def test_an_error_amid_a_suspension_resumes(self, pool: ThinPool, mounted_origin: Path) -> None:
        with pytest.raises(ZeroDivisionError), pool.suspended("origin"):
            raise ZeroDivisionError
        (mounted_origin / "file").write_text("goes on")
        os.sync()
        info = pool.info("origin")
        assert info is not None
        assert info.state is Activation.ACTIVE

    def test_a_file_system_that_cannot_be_frozen_is_an_error_first(
        self, pool: ThinPool, mounted_origin: Path
    ) -> None:
        with mount.frozen(mounted_origin):
            with pytest.raises((DevmapperError, OSError)), pool.suspended("origin"):
                pytest.fail("the body ran")
            info = pool.info("origin")
            assert info is not None
            assert info.state is Activation.ACTIVE
        (mounted_origin / "file").write_text("goes on")
        with pool.suspended("origin"):
            pass

    def test_a_suspended_device_is_not_deactivated(self, pool: ThinPool, origin: Path) -> None:
        with pool.suspended("origin"):
            with pytest.raises(ThinBusy):
                pool.deactivate("origin")
            with pytest.raises(ThinBusy):
                pool.deactivate("origin", deferred=True)
        assert pool.deactivate("origin") is Outcome.DONE

    def test_suspensions_of_one_device_follow_each_other(
        self, pool: ThinPool, mounted_origin: Path
    ) -> None:
        inside = []
        together = threading.Lock()

        def snapshot(number: int) -> None:
            with pool.suspended("origin"):
                assert together.acquire(blocking=False)
                inside.append(number)
                pool.create_snap(ThinId(number), ORIGIN)
                together.release()

        with ThreadPoolExecutor(4) as executor:
            list(executor.map(snapshot, range(10, 18)))
        assert sorted(inside) == list(range(10, 18))
        assert pool.thin_ids() == [ORIGIN, *range(10, 18)]
        (mounted_origin / "file").write_text("goes on")

    # Space

    def test_discarding_gives_space_back(self, pool: ThinPool, origin: Path) -> None:
        write(origin, 0, b"x" * 16 * BLOCK)
        assert pool.status().used_data_blocks == 16
        pool.discard_device("origin")
        pool.commit()
        assert pool.thin_status(ORIGIN).mapped_blocks == 0
        assert pool.status().used_data_blocks == 0
        assert read(origin, 0, 4096) == bytes(4096)

    def test_discarding_leaves_a_snapshot_alone(self, pool: ThinPool, origin: Path) -> None:
        write(origin, 0, b"x" * 4 * BLOCK)
        with pool.suspended("origin"):
            pool.create_snap(SNAP, ORIGIN)
        pool.discard_device("origin")
        snap = pool.activate("snap", SNAP, SIZE)
        assert read(snap, 0, BLOCK) == b"x" * BLOCK
        assert read(origin, 0, BLOCK) == bytes(BLOCK)
        assert pool.status().used_data_blocks == 4

    def test_discarding_what_is_not_active(self, pool: ThinPool) -> None:
        with pytest.raises(OSError, match="not active") as error:
            pool.discard_device("none")
        assert error.value.errno == errno.ENXIO

    def test_deleting_gives_space_back(self, pool: ThinPool, origin: Path) -> None:
        write(origin, 0, b"x" * 16 * BLOCK)
        pool.deactivate("origin")
        pool.delete(ORIGIN)
        pool.commit()
        assert pool.status().used_data_blocks == 0

    def test_the_pool_grows_while_it_is_used(
        self, pool: ThinPool, table: PoolTable, mounted_origin: Path
    ) -> None:
        (mounted_origin / "file").write_bytes(b"kept" * 100_000)
        grown = table._replace(data_size=Bytes(2 * DATA_SIZE))
        self.grow(table.data_device, grown.data_size)
        pool.resize(grown)
        assert pool.status().total_data_blocks == 2 * DATA_SIZE // BLOCK
        assert pool.table() == grown
        os.sync()
        assert (mounted_origin / "file").read_bytes() == b"kept" * 100_000

    def test_exported_metadata_are_sound(
        self, pool: ThinPool, origin: Path, tmp_path: Path
    ) -> None:
        write(origin, 0, b"x" * 4 * BLOCK)
        pool.create_snap(SNAP, ORIGIN)
        pool.commit()
        with pytest.raises(UsageError):
            pool.export_metadata(pool.table().metadata_device)
        copy = tmp_path / "copy"
        pool.export_metadata(copy)
        assert copy.stat().st_size == METADATA_SIZE
        assert copy.stat().st_blocks * 512 < METADATA_SIZE
        if not capabilities.tools():
            process.run(["thin_check", str(copy)])
            dump = process.run(["thin_dump", str(copy)]).stdout.decode()
            assert 'dev_id="1" mapped_blocks="4"' in dump
            assert 'dev_id="2" mapped_blocks="4"' in dump

    # Where two devices differ

    def test_changed_ranges_are_where_devices_differ(self, pool: ThinPool, origin: Path) -> None:
        for block in (0, 1, 2, 50, 300, 301, 700):
            write(origin, block * BLOCK, os.urandom(BLOCK))
        with pool.suspended("origin"):
            pool.create_snap(SNAP, ORIGIN)
        assert pool.changed_ranges(ORIGIN, SNAP) == []
        snap = pool.activate("snap", SNAP, SIZE)
        write(snap, 1 * BLOCK + 5, b"in both")
        write(snap, 51 * BLOCK, b"where there was none")
        write(origin, 300 * BLOCK, b"on the other side")
        expected = [(1, 1), (51, 1), (300, 1)]
        for one, other in ((ORIGIN, SNAP), (SNAP, ORIGIN)):
            found = pool.changed_ranges(one, other)
            assert [(r.begin // BLOCK, r.length // BLOCK) for r in found] == expected
        assert pool.own_blocks(SNAP, ORIGIN) == pool.own_blocks(ORIGIN, SNAP) + 1 == 3
        blockdev.discard(snap, 50 * BLOCK, BLOCK)  # what it has lost is not its own
        assert pool.own_blocks(SNAP, ORIGIN) == 3

    def test_outside_of_the_changed_ranges_all_bytes_are_equal(
        self, pool: ThinPool, origin: Path
    ) -> None:
        chooser = random.Random(4)
        blocks = SIZE // BLOCK
        for block in chooser.sample(range(blocks), 200):
            write(origin, block * BLOCK, os.urandom(512))
        pool.create_snap(SNAP, ORIGIN)
        cousin = ThinId(7)
        pool.create_snap(cousin, ORIGIN)
        one = pool.activate("one", SNAP, SIZE)
        other = pool.activate("other", cousin, SIZE)
        for device in (one, other):
            for block in chooser.sample(range(blocks), 40):
                write(device, block * BLOCK + 4096, os.urandom(512))
        blockdev.discard(other, 10 * BLOCK, 30 * BLOCK)
        ranges = pool.changed_ranges(SNAP, cousin)
        assert ranges == sorted(ranges)
        changed = {
            begin // BLOCK + number for begin, length in ranges for number in range(length // BLOCK)
        }
        differing = {
            block
            for block in range(blocks)
            if read(one, block * BLOCK, BLOCK) != read(other, block * BLOCK, BLOCK)
        }
        assert differing <= changed
        assert len(changed) <= 110

    def test_changed_ranges_of_unknown_ids(self, pool: ThinPool, origin: Path) -> None:
        assert pool.changed_ranges(ORIGIN, ORIGIN) == []
        for one, other in ((ORIGIN, SNAP), (SNAP, ORIGIN)):
            with pytest.raises(ThinIdMissing):
                pool.changed_ranges(one, other)

    def test_changed_ranges_while_the_pool_commits(self, pool: ThinPool, origin: Path) -> None:
        for block in range(0, 900, 3):
            write(origin, block * BLOCK, b"before")
        pool.create_snap(SNAP, ORIGIN)
        snap = pool.activate("snap", SNAP, SIZE)
        write(snap, 5 * BLOCK, b"known")
        stop = threading.Event()

        def load() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                write(snap, (300 + number % 300) * BLOCK, b"%d" % number)

        with ThreadPoolExecutor(1) as executor:
            running = executor.submit(load)
            try:
                for _ in range(20):
                    found = pool.changed_ranges(ORIGIN, SNAP)
                    assert found[0] == (5 * BLOCK, BLOCK)
                    assert all(begin >= 300 * BLOCK for begin, _ in found[1:])
            finally:
                stop.set()
            running.result()
        assert pool.status().held_metadata_root is None

    # The pool and its devices together

    def test_a_pool_with_a_mounted_device_is_busy(
        self, engine: Engine, pool: ThinPool, mounted_origin: Path
    ) -> None:
        before = pool.devices()
        with pytest.raises(ThinBusy):
            engine.deactivate_pool(self.NAME)
        assert pool.devices() == before
        (mounted_origin / "file").write_text("goes on")

    def test_idle_devices_go_with_the_pool(
        self, engine: Engine, pool: ThinPool, table: PoolTable, origin: Path
    ) -> None:
        write(origin, 0, b"kept")
        again = self.reopen(engine, table)
        assert again.devices() == []
        assert read(again.activate("origin", ORIGIN, SIZE), 0, 4) == b"kept"

    def test_threads_in_parallel(self, pool: ThinPool, origin: Path) -> None:
        write(origin, 0, b"shared" * 1000)
        pool.deactivate("origin")

        def live(number: int) -> None:
            name, snap = f"snap-{number}", ThinId(100 + number)
            pool.create_snap(snap, ORIGIN)
            device = pool.activate(name, snap, SIZE)
            mark = b"%06d" % number
            write(device, number * BLOCK, mark * 1000)
            assert read(device, number * BLOCK, 6000) == mark * 1000
            if number:
                assert read(device, 0, 6000) == b"shared" * 1000
            assert pool.deactivate(name) is Outcome.DONE
            if number % 2:
                pool.delete(snap)

        with ThreadPoolExecutor(6) as executor:
            list(executor.map(live, range(12)))
        assert pool.thin_ids() == [ORIGIN, *range(100, 112, 2)]
        assert pool.devices() == []
