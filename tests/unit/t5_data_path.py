"""Reads, writes, snapshots and discards of the embedded engine on plain files."""

import errno
import os
import threading

import pytest

from devmapper.engine.embedded.data_file import DataFile
from devmapper.engine.embedded.mapping_cache import CHUNK_BLOCKS, MAX_CHUNKS
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.port import PoolMode
from devmapper.thin.blocks import FileDevice
from devmapper.units import GIB, KIB, MIB, Bytes, ThinId
from tests.support.pattern import PatternStomper
from tests.support.pools import (
    BLOCK,
    ONE,
    SIZE,
    TWO,
    Background,
    FaultyDataFile,
    Rig,
    assert_clean,
    make_table,
    raises_errno,
    read,
    stop_at,
    used,
    write,
)


class TestReadAndWrite:
    def test_what_was_never_written_reads_as_zeros(self, device):
        assert read(device, 0, 3 * BLOCK) == bytes(3 * BLOCK)
        assert read(device, SIZE - 512, 512) == bytes(512)

    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (0, 512),
            (BLOCK - 512, 1024),
            (4096, 4096),
            (0, BLOCK),
            (BLOCK, 5 * BLOCK),
            (12288, 3 * BLOCK),
            (SIZE - 4096, 4096),
            (0, SIZE),
        ],
    )
    def test_write_then_read(self, device, offset, length):
        data = os.urandom(length)
        write(device, offset, data)
        assert read(device, offset, length) == data
        around = read(device, 0, SIZE)
        assert around[:offset].count(0) == offset
        assert around[offset + length :].count(0) == SIZE - offset - length

    def test_blocks_that_do_not_lie_in_a_row(self, device):
        contents = {}
        for block in (5, 2, 9, 3, 4, 0):  # allocated in this order
            contents[block] = os.urandom(BLOCK)
            write(device, block * BLOCK, contents[block])
        found = read(device, 4096, 10 * BLOCK)
        want = b"".join(contents.get(block, bytes(BLOCK)) for block in range(11))
        assert found == want[4096 : 4096 + 10 * BLOCK]

    def test_neighbouring_blocks_are_moved_in_one_call(self, device, monkeypatch):
        calls = []
        original = DataFile.write

        def record(self, view, offset):
            calls.append(len(view))
            original(self, view, offset)

        monkeypatch.setattr(DataFile, "write", record)
        write(device, 0, bytes(MIB))
        write(device, 4096, bytes(MIB - 4096))
        assert calls == [MIB, MIB - 4096]

    @pytest.mark.parametrize(("offset", "length"), [(SIZE, 512), (SIZE - 512, 1024), (-512, 512)])
    def test_beyond_the_end(self, device, offset, length):
        for call in (
            lambda: read(device, offset, length),
            lambda: write(device, offset, bytes(length)),
            lambda: device.discard(offset, length),
            lambda: device.write_zeroes(offset, length),
        ):
            with raises_errno(errno.EIO):
                call()

    def test_a_write_takes_one_block_where_it_falls(self, pool, device):
        write(device, 7 * BLOCK + 4096, b"x" * 4096)
        assert used(pool) == 1
        status = pool.thin_status(ONE)
        assert (status.mapped_blocks, status.highest_mapped_block) == (1, 7)

    def test_a_size_that_is_no_multiple_of_the_block(self, pool):
        pool.create_thin(ONE)
        with pool.open_device(ONE, Bytes(BLOCK + 4096)) as device:
            write(device, BLOCK, b"e" * 4096)
            assert read(device, BLOCK, 4096) == b"e" * 4096
            device.discard(0, BLOCK + 4096)
        assert used(pool) == 1 or not pool.commit()
        assert pool.thin_status(ONE).mapped_blocks == 0

    def test_contents_survive_closing(self, table):
        data = os.urandom(3 * BLOCK)
        with EmbeddedPool.open(table) as pool:
            pool.create_thin(ONE)
            write(pool.open_device(ONE, SIZE), 4096, data)
        with EmbeddedPool.open(table) as pool:
            assert read(pool.open_device(ONE, SIZE), 4096, len(data)) == data
        assert_clean(table)

    @pytest.mark.parametrize("block_size", [64 * KIB, 192 * KIB, 2 * MIB])
    def test_block_sizes(self, tmp_path, block_size):
        table = make_table(tmp_path, blocks=16, block_size=Bytes(block_size))
        with EmbeddedPool.open(table) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, Bytes(8 * block_size))
            data = os.urandom(2 * block_size)
            write(device, block_size // 2, data)
            pool.create_snap(TWO, ONE)
            write(device, block_size + 4096, b"new" * 1000)
            snap = pool.open_device(TWO, Bytes(8 * block_size))
            assert read(snap, block_size // 2, len(data)) == data
            changed = block_size // 2 + 4096
            assert (
                read(device, block_size // 2, len(data))
                == data[:changed] + b"new" * 1000 + data[changed + 3000 :]
            )
        assert_clean(table)


class TestNewBlocks:
    """What the part of a new block holds that nobody has written."""

    @pytest.fixture
    def dirty(self, table):
        table.data_device.write_bytes(b"\xee" * table.data_size)
        return table

    def test_it_is_zeroed(self, dirty):
        table = dirty._replace(skip_block_zeroing=False)
        with EmbeddedPool.open(table) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, SIZE)
            write(device, 4096, b"x" * 4096)
            assert read(device, 0, BLOCK) == bytes(4096) + b"x" * 4096 + bytes(BLOCK - 8192)

    def test_it_is_left_alone_if_asked_for(self, dirty):
        with EmbeddedPool.open(dirty) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, SIZE)
            write(device, 4096, b"x" * 4096)
            assert read(device, 0, 4096) == b"\xee" * 4096

    def test_what_another_device_left_is_gone_even_so(self, pool, device):
        """A block is punched before it is used again."""
        write(device, 0, b"secret" * 10000)
        device.discard(0, BLOCK)
        pool.commit()
        pool.create_thin(TWO)
        other = pool.open_device(TWO, Bytes(256 * BLOCK))
        for block in range(256):  # the whole pool, so the block comes by
            write(other, block * BLOCK, b"x" * 512)
        assert read(other, 0, 256 * BLOCK).count(b"secret") == 0

    def test_zeroing_leaves_holes_in_a_sparse_file(self, table):
        with EmbeddedPool.open(table._replace(skip_block_zeroing=False)) as pool:
            pool.create_thin(ONE)
            write(pool.open_device(ONE, SIZE), 8192, b"x" * 4096)
            pool.commit()
            assert table.data_device.stat().st_blocks * 512 < BLOCK


class TestSnapshots:
    def test_both_sides_are_isolated(self, pool, device):
        data = os.urandom(4 * BLOCK)
        write(device, 0, data)
        pool.create_snap(TWO, ONE)
        snap = pool.open_device(TWO, SIZE)
        write(device, 4096, b"origin")
        write(snap, BLOCK, b"snap")
        assert read(snap, 0, BLOCK) == data[:BLOCK]
        assert read(device, 0, BLOCK) == data[:4096] + b"origin" + data[4102:BLOCK]
        assert read(device, BLOCK, BLOCK) == data[BLOCK : 2 * BLOCK]
        assert read(snap, BLOCK, BLOCK) == b"snap" + data[BLOCK + 4 : 2 * BLOCK]
        assert used(pool) == 4 + 2

    def test_a_write_over_a_whole_block_copies_nothing(self, pool, device, monkeypatch):
        write(device, 0, os.urandom(2 * BLOCK))
        pool.create_snap(TWO, ONE)
        reads = []
        original = DataFile.read

        def record(self, view, offset):
            reads.append(offset)
            original(self, view, offset)

        monkeypatch.setattr(DataFile, "read", record)
        write(device, 0, bytes(2 * BLOCK))
        assert reads == []
        write(device, 0, bytes(512))  # in place now
        assert used(pool) == 4

    def test_sharing_is_broken_once(self, pool, device):
        write(device, 0, b"a" * BLOCK)
        pool.create_snap(TWO, ONE)
        for _ in range(3):
            write(device, 0, b"b" * 512)
        assert used(pool) == 2

    def test_a_deep_chain(self, pool, device):
        stomper = PatternStomper(device, "1", size=SIZE)
        generations = [stomper]
        for number in range(2, 9):
            stomper.stamp(6)
            pool.create_snap(ThinId(number), ThinId(number - 1))
            stomper = stomper.fork(pool.open_device(ThinId(number), SIZE), str(number))
            generations.append(stomper)
        for stomper in generations:
            stomper.stamp(3)
            stomper.discard(2)
            stomper.zero(2)
        for stomper in generations:
            stomper.verify()

    def test_no_write_that_began_before_lands_in_the_snapshot_later(self, table):
        """A write that has looked its mapping up is let through before the snapshot."""
        data = FaultyDataFile(os.open(table.data_device, os.O_RDWR), table.data_device)
        rig = Rig(table, data, FileDevice.open(table.metadata_device))
        rig.pool.create_thin(ONE)
        device = rig.pool.open_device(ONE, SIZE)
        write(device, 0, b"old" * 1000)
        inside, go_on = threading.Event(), threading.Event()
        data.before_write = stop_at(inside, go_on)
        writing = Background(lambda: write(device, 0, b"new" * 1000))
        assert inside.wait(60)
        data.before_write = None
        snapping = Background(lambda: rig.pool.create_snap(TWO, ONE))
        assert snapping.is_running()
        later = Background(lambda: write(device, 0, b"end" * 1000))
        assert later.is_running()
        go_on.set()
        for call in (writing, snapping, later):
            call.result()
        assert read(rig.pool.open_device(TWO, SIZE), 0, 3000) == b"new" * 1000
        assert read(device, 0, 3000) == b"end" * 1000
        rig.close()
        assert_clean(table)


class TestDiscard:
    def test_whole_blocks_are_unmapped_and_given_back(self, table, pool, device):
        write(device, 0, os.urandom(8 * BLOCK))
        device.flush()
        taken = table.data_device.stat().st_blocks
        device.discard(BLOCK, 6 * BLOCK)
        assert read(device, BLOCK, 6 * BLOCK) == bytes(6 * BLOCK)
        device.flush()
        pool.close()
        assert pool.thin_status(ONE).mapped_blocks == 2
        assert table.data_device.stat().st_blocks == taken // 4

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (4096, 4096),
            (4096, BLOCK),
            (BLOCK - 512, 1024),
            (512, 3 * BLOCK),
            (0, BLOCK + 512),
            (2 * BLOCK - 512, 512 + BLOCK),
        ],
    )
    def test_the_whole_range_reads_as_zeros(self, pool, device, offset, length, shared):
        data = os.urandom(5 * BLOCK)
        write(device, 0, data)
        if shared:
            pool.create_snap(TWO, ONE)
        device.discard(offset, length)
        want = data[:offset] + bytes(length) + data[offset + length :]
        assert read(device, 0, 5 * BLOCK) == want
        if shared:
            assert read(pool.open_device(TWO, SIZE), 0, 5 * BLOCK) == data

    def test_a_shared_block_that_is_zero_there_stays_shared(self, pool, device):
        write(device, 0, b"x" * 4096 + bytes(BLOCK - 4096))
        pool.create_snap(TWO, ONE)
        device.discard(8192, 4096)
        device.write_zeroes(8192, 4096)
        assert used(pool) == 1

    def test_shared_blocks_stay_for_the_other(self, pool, device):
        data = os.urandom(4 * BLOCK)
        write(device, 0, data)
        pool.create_snap(TWO, ONE)
        device.discard(0, SIZE)
        pool.commit()
        assert read(device, 0, 4 * BLOCK) == bytes(4 * BLOCK)
        assert read(pool.open_device(TWO, SIZE), 0, 4 * BLOCK) == data
        assert used(pool) == 4

    def test_ignored(self, table):
        with EmbeddedPool.open(table._replace(ignore_discard=True)) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, SIZE)
            write(device, 0, b"x" * BLOCK)
            with raises_errno(errno.EOPNOTSUPP):
                device.discard(0, BLOCK)
            assert not pool.status().discard_passdown
            assert read(device, 0, 1) == b"x"

    def test_not_passed_down(self, table):
        with EmbeddedPool.open(table._replace(no_discard_passdown=True)) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, SIZE)
            write(device, 0, b"x" * BLOCK)
            device.flush()
            device.discard(0, BLOCK)
            device.flush()
            assert used(pool) == 0
        assert table.data_device.read_bytes()[:BLOCK] == b"x" * BLOCK

    def test_write_zeroes_keeps_what_is_mapped(self, pool, device):
        write(device, 0, os.urandom(2 * BLOCK))
        device.write_zeroes(4096, 6 * BLOCK)
        assert read(device, 4096, 6 * BLOCK) == bytes(6 * BLOCK)
        assert read(device, 0, 4096) != bytes(4096)
        assert pool.thin_status(ONE).mapped_blocks == 2

    def test_a_discard_goes_by_what_is_mapped(self, pool):
        """Block by block this one would take hours."""
        pool.create_thin(ONE)
        device = pool.open_device(ONE, Bytes(64 * 1024 * GIB))
        write(device, 32 * 1024 * GIB, b"x" * 512)
        device.discard(0, 64 * 1024 * GIB)
        assert pool.thin_status(ONE).mapped_blocks == 0

    def test_freed_blocks_are_not_used_while_a_reader_is_in_them(self, pool, device):
        """A reader that looked a block up before the discard sees the old data or zeros."""
        write(device, 0, b"old!" * (BLOCK // 4))
        side = device.traffic.enter()  # as a reader that is slow
        device.discard(0, BLOCK)
        pool.commit()
        pool.create_thin(TWO)
        other = pool.open_device(TWO, Bytes(256 * BLOCK))
        write(other, 0, b"new!" * (BLOCK // 4) * 255)
        waiting = Background(lambda: write(other, 255 * BLOCK, b"new!"))
        assert waiting.is_running()
        assert pool.status().mode is PoolMode.WRITE
        device.traffic.leave(side)
        waiting.result()


class TestCache:
    def test_it_is_bounded(self, pool):
        pool.create_thin(ONE)
        device = pool.open_device(ONE, Bytes(10 * 1024 * GIB))
        for chunk in range(MAX_CHUNKS + 20):
            read(device, chunk * CHUNK_BLOCKS * BLOCK, 512)
        assert len(device.cache.chunks) == MAX_CHUNKS

    def test_ten_gibibytes_cost_little(self, pool):
        pool.create_thin(ONE)
        device = pool.open_device(ONE, Bytes(10 * GIB))
        for offset in range(0, 10 * GIB, CHUNK_BLOCKS * BLOCK):
            read(device, offset, 512)
        size = sum(len(chunk) * chunk.itemsize for chunk in device.cache.chunks.values())
        assert size <= 2 * MIB

    def test_evicted_chunks_are_read_back(self, pool):
        pool.create_thin(ONE)
        size = (MAX_CHUNKS + 8) * CHUNK_BLOCKS * BLOCK
        device = pool.open_device(ONE, Bytes(size))
        offsets = range(0, size, CHUNK_BLOCKS * BLOCK * 16)
        for offset in offsets:
            write(device, offset, offset.to_bytes(8, "little"))
        for chunk in range(MAX_CHUNKS + 8):
            read(device, chunk * CHUNK_BLOCKS * BLOCK, 512)
        for offset in offsets:
            assert read(device, offset, 8) == offset.to_bytes(8, "little")
