"""Metadata that we grew are accepted by the kernel, and the other way round."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.port import PoolTable
from devmapper.linux import loop, process
from devmapper.units import MIB, Bytes, ThinId
from tests.support.pools import BLOCK, assert_clean, read, write
from tests.support.thin_tools import thin_dump

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.tools]

ONE = ThinId(1)
SIZE = Bytes(8 * MIB)
SECTORS = BLOCK // 512


@pytest.fixture
def table(tmp_path: Path) -> PoolTable:
    for name, size in (("metadata", MIB), ("data", 16 * MIB)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    data_size = Bytes(16 * MIB)
    return PoolTable(
        tmp_path / "metadata", tmp_path / "data", data_size, Bytes(BLOCK), low_water_mark=0
    )


def dmsetup(*argv: str) -> str:
    return process.run(["dmsetup", *argv]).stdout.decode()


@contextmanager
def kernel_pool(table: PoolTable) -> Iterator[tuple[Path, Path]]:
    """The pool and its thin device 1, active in the kernel; yields the two loop devices."""
    with ExitStack() as undo:
        metadata = undo.enter_context(loop.attached(table.metadata_device))
        data = undo.enter_context(loop.attached(table.data_device))
        load(metadata, data, table.data_size, create=True)
        undo.callback(dmsetup, "remove", "--retry", "psgrow")
        thin = f"0 {SIZE // 512} thin /dev/mapper/psgrow 1"
        dmsetup("create", "psgrow1", "--table", thin)
        undo.callback(dmsetup, "remove", "--retry", "psgrow1")
        yield metadata, data


def load(metadata: Path, data: Path, size: int, *, create: bool) -> None:
    line = f"0 {size // 512} thin-pool {metadata} {data} {SECTORS} 0 1 skip_block_zeroing"
    if create:
        dmsetup("create", "psgrow", "--table", line)
    else:
        dmsetup("suspend", "psgrow")
        dmsetup("load", "psgrow", "--table", line)
        dmsetup("resume", "psgrow")


def totals() -> tuple[int, int, str]:
    """Metadata blocks, data blocks and mode of the kernel's pool."""
    fields = dmsetup("status", "psgrow").split()
    return int(fields[4].split("/")[1]), int(fields[5].split("/")[1]), fields[7]


def thin_io(offset: int, data: bytes) -> None:
    with open("/dev/mapper/psgrow1", "r+b", buffering=0) as device:
        os.pwrite(device.fileno(), data, offset)
        os.fsync(device.fileno())


def thin_read(offset: int, length: int) -> bytes:
    with open("/dev/mapper/psgrow1", "rb", buffering=0) as device:
        return os.pread(device.fileno(), length, offset)


@pytest.mark.parametrize("size", [2 * MIB, 70 * MIB, 200 * MIB])
def test_what_we_grew_the_kernel_takes(table, size):
    """To more blocks in the same bitmap, to a second bitmap, to a fourth."""
    with EmbeddedPool.open(table) as pool:
        pool.create_thin(ONE)
        write(pool.open_device(ONE, SIZE), 0, b"a" * 4 * BLOCK)
        pool.commit()
        os.truncate(table.metadata_device, size)
        pool.resize(table)
        assert pool.status().total_metadata_blocks == size // 4096
    assert_clean(table)
    before = thin_dump(table.metadata_device)
    with kernel_pool(table):
        assert totals() == (size // 4096, 256, "rw")
        assert thin_read(0, 4 * BLOCK) == b"a" * 4 * BLOCK
    assert thin_dump(table.metadata_device) == before
    with kernel_pool(table):
        thin_io(2 * BLOCK, b"b" * 4 * BLOCK)
        dmsetup("message", "psgrow", "0", "create_snap 2 1")
        assert totals()[2] == "rw"
    assert_clean(table)
    with EmbeddedPool.open(table) as pool, pool.open_device(ONE, SIZE) as device:
        assert read(device, 0, 6 * BLOCK) == b"a" * 2 * BLOCK + b"b" * 4 * BLOCK
        assert pool.thin_ids() == [1, 2]


def test_the_kernel_grows_and_we_go_on_and_back(table):
    with EmbeddedPool.open(table) as pool:
        pool.create_thin(ONE)
    with kernel_pool(table) as (metadata, data):
        thin_io(0, b"a" * BLOCK)
        os.truncate(table.metadata_device, 80 * MIB)
        os.truncate(table.data_device, 32 * MIB)
        for device in (metadata, data):
            loop.set_capacity(device)
        load(metadata, data, 32 * MIB, create=False)
        assert totals() == (80 * MIB // 4096, 512, "rw")
        thin_io(BLOCK, b"b" * BLOCK)
    assert_clean(table)
    grown = table._replace(data_size=Bytes(32 * MIB))
    with EmbeddedPool.open(grown) as pool:
        status = pool.status()
        assert (status.total_metadata_blocks, status.total_data_blocks) == (80 * MIB // 4096, 512)
        os.truncate(table.metadata_device, 160 * MIB)
        pool.resize(grown)
        with pool.open_device(ONE, SIZE) as thin:
            assert read(thin, 0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
            write(thin, 2 * BLOCK, b"c" * BLOCK)
    assert_clean(grown)
    with kernel_pool(grown):
        assert totals() == (160 * MIB // 4096, 512, "rw")
        assert thin_read(0, 3 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK + b"c" * BLOCK
    assert_clean(grown)
