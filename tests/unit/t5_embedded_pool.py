"""The embedded pool as an object: ids, tables, opening, closing."""

import errno
import os
import subprocess
import sys

import pytest

from devmapper.engine.embedded.data_file import DataFile
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.port import PoolMode
from devmapper.errors import (
    IntegrityError,
    PoolBusy,
    PoolMismatch,
    PoolUnusable,
    ThinBusy,
    ThinIdExists,
    ThinIdMissing,
    TransactionConflict,
    UsageError,
)
from devmapper.thin.blocks import FileDevice, MemoryDevice
from devmapper.thin.metadata import PoolMetadata
from devmapper.units import GIB, KIB, MIB, Bytes, ThinId, TransactionId
from tests.support.pools import (
    BLOCK,
    ONE,
    SIZE,
    THREE,
    TWO,
    Rig,
    assert_clean,
    make_table,
    raises_errno,
    read,
    write,
)


class TestManagement:
    def test_ids(self, pool):
        pool.create_thin(ONE)
        pool.create_snap(TWO, ONE)
        assert pool.thin_ids() == [ONE, TWO]
        with pytest.raises(ThinIdExists):
            pool.create_thin(ONE)
        with pytest.raises(ThinIdMissing):
            pool.create_snap(THREE, ThinId(9))
        for call in (pool.delete, pool.thin_status, lambda i: pool.open_device(i, SIZE)):
            with pytest.raises(ThinIdMissing):
                call(THREE)
        pool.delete(ONE)
        assert pool.thin_ids() == [TWO]

    def test_an_open_device_is_busy(self, pool, device):
        with pytest.raises(ThinBusy):
            pool.delete(ONE)
        with pytest.raises(ThinBusy):
            pool.open_device(ONE, SIZE)
        device.close()
        pool.open_device(ONE, SIZE).close()
        pool.delete(ONE)

    def test_transaction_id(self, table, pool):
        pool.set_transaction_id(TransactionId(0), TransactionId(7))
        with pytest.raises(TransactionConflict):
            pool.set_transaction_id(TransactionId(0), TransactionId(8))
        with FileDevice.open(table.metadata_device, read_only=True) as device:
            assert PoolMetadata.open(device, read_only=True).transaction_id == 7

    def test_sizes_of_devices(self, pool):
        pool.create_thin(ONE)
        for size in (0, -512, 1000):
            with pytest.raises(UsageError):
                pool.open_device(ONE, Bytes(size))

    def test_closing_twice_and_what_comes_later(self, table):
        pool = EmbeddedPool.open(table)
        pool.create_thin(ONE)
        device = pool.open_device(ONE, SIZE)
        pool.close()
        pool.close()
        with raises_errno(errno.EIO):
            write(device, 0, b"x")
        with pytest.raises(PoolUnusable):
            pool.open_device(ONE, SIZE)


class TestOpening:
    def test_one_pool_is_opened_once(self, table, pool):
        with pytest.raises(PoolBusy) as caught:
            EmbeddedPool.open(table)
        assert f"process {os.getpid()}" in str(caught.value)

    def test_nor_by_another_process(self, table):
        code = (
            "import sys; from devmapper.engine.device_lock import device_lock;"
            "from pathlib import Path\n"
            "with device_lock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
        )
        argv = [sys.executable, "-c", code, str(table.metadata_device)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            try:
                assert other.stdout is not None
                other.stdout.readline()
                with pytest.raises(PoolBusy) as caught:
                    EmbeddedPool.open(table)
                assert f"process {other.pid} (" in str(caught.value)
            finally:
                other.kill()
        EmbeddedPool.open(table).close()

    @pytest.mark.parametrize(
        ("changed", "error"),
        [
            ({"block_size": 128 * KIB}, PoolMismatch),
            ({"block_size": 100 * KIB}, UsageError),
            ({"block_size": 0}, UsageError),
            ({"data_size": 255 * BLOCK}, PoolMismatch),
            ({"data_size": 257 * BLOCK}, PoolMismatch),
            ({"data_size": 256 * BLOCK + 512}, UsageError),
            ({"data_size": 0}, UsageError),
        ],
    )
    def test_tables_that_do_not_fit(self, table, changed, error):
        EmbeddedPool.open(table).close()
        before = table.metadata_device.read_bytes()
        with pytest.raises(error):
            EmbeddedPool.open(table._replace(**changed))
        assert table.metadata_device.read_bytes() == before

    def test_nothing_is_formatted_when_the_data_file_is_short(self, table):
        os.truncate(table.data_device, 10 * BLOCK)
        with pytest.raises(PoolMismatch):
            EmbeddedPool.open(table)
        assert not any(table.metadata_device.read_bytes())

    def test_one_file_for_both(self, table, tmp_path):
        link = tmp_path / "link"
        link.hardlink_to(table.data_device)
        for path in (table.data_device, link):
            with pytest.raises(UsageError):
                EmbeddedPool.open(table._replace(metadata_device=path))

    def test_damage(self, table):
        EmbeddedPool.open(table).close()
        with table.metadata_device.open("r+b") as file:
            file.seek(50)
            file.write(b"\xff")
        with pytest.raises(IntegrityError):
            EmbeddedPool.open(table)
        table.metadata_device.write_bytes(os.urandom(MIB))
        with pytest.raises(IntegrityError):
            EmbeddedPool.open(table)

    def test_missing_devices(self, table):
        for name in ("metadata_device", "data_device"):
            with pytest.raises(FileNotFoundError):
                EmbeddedPool.open(table._replace(**{name: table.data_device.parent / "absent"}))
        with raises_errno(errno.EISDIR):
            EmbeddedPool.open(table._replace(data_device=table.data_device.parent))

    def test_after_any_refusal_it_can_be_opened(self, table):
        for _ in range(2):
            with pytest.raises(PoolMismatch):
                EmbeddedPool.open(table._replace(data_size=Bytes(257 * BLOCK)))
        EmbeddedPool.open(table).close()

    def test_a_grown_data_device_is_used(self, table):
        EmbeddedPool.open(table).close()
        os.truncate(table.data_device, 300 * BLOCK)
        with EmbeddedPool.open(table._replace(data_size=Bytes(300 * BLOCK))) as pool:
            assert pool.status().total_data_blocks == 300
        assert_clean(table)

    def test_a_grown_metadata_device_is_used(self, table):
        EmbeddedPool.open(table).close()
        os.truncate(table.metadata_device, 8 * MIB)
        with EmbeddedPool.open(table) as pool:
            assert pool.status().total_metadata_blocks == 2048
            os.truncate(table.metadata_device, 16 * MIB)
            pool.resize(table)
            assert pool.status().total_metadata_blocks == 4096
        assert_clean(table)

    def test_read_only(self, table):
        with EmbeddedPool.open(table) as pool:
            pool.create_thin(ONE)
            write(pool.open_device(ONE, SIZE), 0, b"x" * 512)
        before = table.metadata_device.read_bytes(), table.data_device.stat().st_mtime_ns
        with EmbeddedPool.open(table._replace(read_only=True)) as pool:
            assert pool.status().mode is PoolMode.READ_ONLY
            device = pool.open_device(ONE, SIZE)
            assert read(device, 0, 512) == b"x" * 512
            with raises_errno(errno.EROFS):
                write(device, 0, b"y")
            with raises_errno(errno.EROFS):
                device.discard(0, BLOCK)
            device.flush()
            with pytest.raises(PoolUnusable):
                pool.create_thin(TWO)
        after = table.metadata_device.read_bytes(), table.data_device.stat().st_mtime_ns
        assert after == before

    def test_a_large_pool_opens_by_reading_little(self, tmp_path, monkeypatch):
        table = make_table(tmp_path, blocks=100 * GIB // BLOCK)
        os.truncate(table.metadata_device, 128 * MIB)
        EmbeddedPool.open(table).close()
        blocks: list[int] = []
        read_block = FileDevice.read

        def counted(device, block):
            blocks.append(block)
            return read_block(device, block)

        monkeypatch.setattr(FileDevice, "read", counted)
        EmbeddedPool.open(table).close()
        assert 0 < len(blocks) < 100  # of 32768


def test_metadata_in_memory(tmp_path):
    """Metadata need no file: a scratch pool."""
    table = make_table(tmp_path)
    rig = Rig(table, DataFile.open(table.data_device), MemoryDevice(1024))
    rig.pool.create_thin(ONE)
    device = rig.pool.open_device(ONE, SIZE)
    write(device, 0, b"x" * 512)
    device.flush()
    assert read(device, 0, 512) == b"x" * 512
    rig.close()
