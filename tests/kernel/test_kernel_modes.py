"""A pool in every mode, made to happen for real, and what it answers then.

The errnos of the kernel that `engine/kernel/errors.py` translates are these.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devmapper.engine.kernel import devices
from devmapper.engine.kernel.engine import KernelEngine
from devmapper.engine.kernel.pool import KernelPool
from devmapper.engine.port import PoolMode, PoolTable
from devmapper.errors import (
    ChecksumError,
    DevmapperError,
    IntegrityError,
    PoolFull,
    PoolMismatch,
    PoolUnusable,
    Space,
    ThinIdExists,
    ThinIdMissing,
    TransactionConflict,
    UsageError,
)
from devmapper.linux import blockdev, process
from devmapper.units import KIB, MIB, Bytes, ThinId, TransactionId
from tests.conformance.engine_suite import write
from tests.kernel.conftest import POOL, check
from tests.support import dm, programs
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kernel

ONE, TWO, NEW, MISSING = ThinId(1), ThinId(2), ThinId(50), ThinId(99)
SIZE = Bytes(128 * MIB)


def changes(pool: KernelPool) -> list[object]:
    """What becomes of each change of the pool: the class of its error."""
    calls: tuple[Callable[[], None], ...] = (
        lambda: pool.create_thin(NEW),
        lambda: pool.create_snap(NEW, ONE),
        lambda: pool.delete(TWO),
        lambda: pool.set_transaction_id(TransactionId(0), TransactionId(1)),
        pool.commit,
    )
    found: list[object] = []
    for call in calls:
        try:
            call()
        except DevmapperError as err:
            found.append(type(err))
        else:
            found.append(None)
    return found


class TestFailingMetadata:
    """The metadata device fails under an active pool."""

    @pytest.fixture
    def device(self, tmp_path: Path) -> Iterator[dm.Replaceable]:
        table = dm.make_table(tmp_path)
        with dm.replaceable("metadata-below", table.metadata_device) as device:
            yield device

    @pytest.fixture
    def table(self, tmp_path: Path, device: dm.Replaceable) -> PoolTable:
        return PoolTable(device.path, tmp_path / "data", dm.DATA_SIZE, dm.BLOCK)

    @pytest.fixture
    def pool(self, engine: KernelEngine, table: PoolTable) -> Iterator[KernelPool]:
        pool = engine.activate_pool(POOL, table)
        pool.create_thin(ONE)
        pool.create_thin(TWO)
        pool.commit()
        yield pool
        dm.settle()
        engine.deactivate_pool(POOL)

    def test_writes_that_fail_make_it_read_only(self, engine, pool, device, table, tmp_path):
        device.fail_writes()
        pool.create_thin(NEW)  # the kernel's answer: it does not tell that its commit failed
        with pytest.raises(PoolUnusable, match="need a check"):
            pool.commit()
        status = pool.status()
        assert (status.mode, status.needs_check) == (PoolMode.READ_ONLY, True)
        assert dm.status_line(POOL).split()[4] == "ro"
        assert set(changes(pool)) == {PoolUnusable}
        device.work()
        assert set(changes(pool)) == {PoolUnusable}
        assert pool.thin_ids() == [ONE, TWO], "it is at its last commit"
        assert pool.thin_status(TWO).mapped_blocks == 0
        with pytest.raises(ThinIdMissing):
            pool.activate("none", MISSING, SIZE)
        path = pool.activate("one", ONE, SIZE)
        with blockdev.opened(path, os.O_RDONLY) as fd:
            assert os.pread(fd, 4096, 0) == bytes(4096)
        dm.settle()
        pool.deactivate("one")
        pool.export_metadata(tmp_path / "copy")
        # It stays so until it was checked
        engine.deactivate_pool(POOL)
        again = engine.activate_pool(POOL, table)
        assert again.status().needs_check
        engine.deactivate_pool(POOL)
        process.run(["thin_check", "--clear-needs-check-flag", str(device.path)])
        again = engine.activate_pool(POOL, table)
        assert again.status().mode is PoolMode.WRITE
        again.create_thin(NEW)

    def test_a_transaction_that_was_not_committed_is_told(self, engine, pool, device, table):
        device.fail_writes()
        with pytest.raises(PoolUnusable):
            pool.set_transaction_id(TransactionId(0), TransactionId(1))
        device.work()
        assert pool.status().transaction_id == 1, "the kernel's status does not know it yet"
        engine.deactivate_pool(POOL)
        assert engine.activate_pool(POOL, table).status().transaction_id == 0

    def test_a_device_that_is_gone_makes_it_fail(self, pool, device, table):
        device.fail()
        with pytest.raises(PoolUnusable, match="fail"):
            pool.commit()
        assert dm.status_line(POOL) == "Fail"
        status = pool.status()
        assert status.mode is PoolMode.FAIL
        assert status.total_data_blocks == status.used_metadata_blocks == 0
        assert status.block_size == dm.BLOCK
        assert set(changes(pool)) == {PoolUnusable}
        for call in (pool.thin_ids, lambda: pool.activate("one", ONE, SIZE)):
            with pytest.raises(PoolUnusable):
                call()
        assert devices.find_state("one") is None
        assert pool.table().metadata_device == table.metadata_device
        assert pool.devices() == []

    def test_a_device_that_cannot_be_read_is_no_pool(self, engine, table, device):
        device.fail()
        with pytest.raises(OSError, match="Input/output error"):
            engine.activate_pool(POOL, table)
        assert devices.find_state(POOL) is None


class TestSpace:
    def test_a_full_pool_goes_on_with_its_metadata(self, engine, tmp_path):
        table = dm.make_table(tmp_path, data_size=Bytes(8 * MIB))
        table = table._replace(error_if_no_space=True)
        pool = engine.activate_pool(POOL, table)
        pool.create_thin(ONE)
        pool.create_thin(TWO)
        device = pool.activate("one", ONE, SIZE)
        with pytest.raises(OSError, match="error"):
            write(device, 0, b"x" * 16 * MIB)
        status = pool.status()
        assert status.mode is PoolMode.OUT_OF_DATA_SPACE
        assert status.error_if_no_space
        assert status.low_water_reached
        assert status.used_data_blocks == status.total_data_blocks == 128
        pool.create_thin(NEW)
        with pytest.raises(ThinIdExists):
            pool.create_thin(ONE)
        with pytest.raises(ThinIdMissing):
            pool.create_snap(ThinId(51), MISSING)
        with pytest.raises(TransactionConflict):
            pool.set_transaction_id(TransactionId(7), TransactionId(8))
        pool.set_transaction_id(TransactionId(0), TransactionId(1))
        dm.settle()
        pool.deactivate("one")
        pool.delete(ONE)
        pool.commit()
        assert pool.status().mode is PoolMode.WRITE
        engine.deactivate_pool(POOL)
        check(table)

    def test_writers_of_a_full_pool_go_on_when_it_grows(self, engine, tmp_path):
        table = dm.make_table(tmp_path, data_size=Bytes(8 * MIB))
        pool = engine.activate_pool(POOL, table)
        pool.create_thin(ONE)
        device = pool.activate("one", ONE, SIZE)
        program = (
            "import os, sys; fd = os.open(sys.argv[1], os.O_WRONLY);"
            "os.pwrite(fd, b'x' * (16 << 20), 0); os.fsync(fd)"
        )
        with programs.program(program, str(device)) as writer:
            wait_for(lambda: pool.status().mode is PoolMode.OUT_OF_DATA_SPACE)
            os.truncate(table.data_device, 32 * MIB)
            pool.resize(table._replace(data_size=Bytes(32 * MIB)))
            assert writer.wait(60) == 0
        assert pool.status().mode is PoolMode.WRITE
        dm.settle()
        engine.deactivate_pool(POOL)
        check(table)

    def test_out_of_metadata_is_told_as_that(self, engine, tmp_path):
        table = dm.make_table(tmp_path, metadata_size=Bytes(256 * KIB))
        pool = engine.activate_pool(POOL, table)
        pool.create_thin(ONE)
        pool.create_thin(TWO)
        with pytest.raises(PoolFull) as full:
            _create_thins(pool, 1000)
        assert full.value.kind is Space.METADATA
        assert set(changes(pool)) == {PoolFull}
        assert ONE in pool.thin_ids()
        os.truncate(table.metadata_device, 4 * MIB)
        pool.resize(table)
        assert pool.status().mode is PoolMode.WRITE
        pool.create_thin(NEW)
        engine.deactivate_pool(POOL)
        check(table)


class TestActivation:
    """Devices and tables that are no pool, or not this one: nothing is left active."""

    @pytest.fixture(autouse=True)
    def nothing_left(self, table: PoolTable) -> Iterator[None]:
        yield
        assert devices.find_state(POOL) is None
        dm.await_no_loops_on(table.metadata_device, table.data_device)

    @pytest.fixture
    def made(self, engine: KernelEngine, table: PoolTable) -> PoolTable:
        """The table of a pool that exists, but is not active."""
        engine.activate_pool(POOL, table).create_thin(ONE)
        engine.deactivate_pool(POOL)
        return table

    def test_a_superblock_with_a_wrong_checksum(self, engine, made):
        _change(made.metadata_device, 300, b"\xff")
        with pytest.raises(ChecksumError):
            engine.activate_pool(POOL, made)

    def test_damage_behind_the_superblock(self, engine, made):
        _change(made.metadata_device, 4096, os.urandom(dm.METADATA_SIZE - 4096))
        with pytest.raises(IntegrityError, match="damaged"):
            engine.activate_pool(POOL, made)

    def test_a_metadata_device_that_was_cut_off(self, engine, made):
        os.truncate(made.metadata_device, dm.METADATA_SIZE // 2)
        with pytest.raises(PoolMismatch, match="metadata device has 512 blocks"):
            engine.activate_pool(POOL, made)

    def test_a_data_device_that_was_cut_off(self, engine, made):
        os.truncate(made.data_device, made.data_size // 2)
        with pytest.raises(PoolMismatch, match="data device"):
            engine.activate_pool(POOL, made)
        shorter = made._replace(data_size=Bytes(made.data_size // 2))
        with pytest.raises(PoolMismatch, match="has 1024 data blocks, but only 512"):
            engine.activate_pool(POOL, shorter)

    @pytest.mark.parametrize("blocks", [1, 8])
    def test_a_metadata_device_that_is_too_small(self, engine, table, blocks):
        os.truncate(table.metadata_device, blocks * 4096)
        with pytest.raises(PoolFull) as full:
            engine.activate_pool(POOL, table)
        assert full.value.kind is Space.METADATA

    def test_a_blank_pool_that_may_not_be_written_to(self, engine, table):
        with pytest.raises(PoolMismatch, match="no pool"):
            engine.activate_pool(POOL, table._replace(read_only=True))

    def test_one_device_for_both(self, engine, table):
        with pytest.raises(UsageError, match="both"):
            engine.activate_pool(POOL, table._replace(metadata_device=table.data_device))

    def test_a_device_that_is_not_there(self, engine, table, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing"):
            engine.activate_pool(POOL, table._replace(metadata_device=tmp_path / "nothing"))

    def test_a_pool_that_exists_is_activated_read_only(self, engine, made):
        pool = engine.activate_pool(POOL, made._replace(read_only=True))
        assert pool.status().mode is PoolMode.READ_ONLY
        assert set(changes(pool)) == {PoolUnusable}
        assert pool.thin_ids() == [ONE]
        engine.deactivate_pool(POOL)
        check(made)


def _create_thins(pool: KernelPool, number: int) -> None:
    for thin_id in range(100, 100 + number):
        pool.create_thin(ThinId(thin_id))


def _change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
