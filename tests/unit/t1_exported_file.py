"""One file of the export: odd requests, and what waits while its target is blocked."""

import errno
import os
import random

import pytest

from devmapper.engine.embedded.exported_file import ExportedFile, Request
from devmapper.linux.fuse import Opcode
from tests.support.export_server import BLOCK_SIZE, MemoryTarget

SIZE = 4 * BLOCK_SIZE


@pytest.fixture
def target() -> MemoryTarget:
    return MemoryTarget(SIZE)


@pytest.fixture
def file(target: MemoryTarget) -> ExportedFile:
    return ExportedFile("thin", 2, target)


def read_all(target: MemoryTarget) -> bytes:
    buffer = bytearray(SIZE)
    target.read(0, memoryview(buffer))
    return bytes(buffer)


def test_writes_of_any_alignment_change_what_they_cover(
    file: ExportedFile, target: MemoryTarget
) -> None:
    model = bytearray(os.urandom(SIZE))
    target.write(0, memoryview(model))
    chance = random.Random(7)
    for _ in range(200):
        offset = chance.randrange(SIZE)
        data = chance.randbytes(min(chance.randrange(1, 3000), SIZE - offset))
        file.write_slowly(offset, memoryview(data))
        model[offset : offset + len(data)] = data
        there = bytearray(len(data) + 7)
        assert file.read_slowly(offset, memoryview(there)) == min(len(there), SIZE - offset)
        assert there[: len(data)] == data
    assert read_all(target) == bytes(model)


def test_reads_end_with_the_device_and_writes_do_not_pass_it(file: ExportedFile) -> None:
    buffer = memoryview(bytearray(b"x" * 1024))
    assert file.read_slowly(SIZE - 512, buffer) == 512
    assert bytes(buffer) == bytes(512) + b"x" * 512
    assert file.read_slowly(SIZE, buffer) == 0
    assert file.read_slowly(SIZE + 4096, buffer) == 0
    with pytest.raises(OSError, match="beyond the end") as caught:
        file.write_slowly(SIZE - 512, buffer)
    assert caught.value.errno == errno.ENOSPC


def test_fallocate_modes(file: ExportedFile, target: MemoryTarget) -> None:
    target.write(0, memoryview(b"x" * SIZE))
    file.fallocate(0, BLOCK_SIZE, 0x03)
    assert target.mapped == {1, 2, 3}
    file.fallocate(BLOCK_SIZE, BLOCK_SIZE, 0x10)
    file.fallocate(2 * BLOCK_SIZE, BLOCK_SIZE, 0x11)
    assert target.mapped == {1, 2, 3}
    assert read_all(target) == bytes(3 * BLOCK_SIZE) + b"x" * BLOCK_SIZE
    file.fallocate(3 * BLOCK_SIZE, 10 * BLOCK_SIZE, 0x03)
    assert target.mapped == {1, 2}
    file.fallocate(SIZE, BLOCK_SIZE, 0x03)


@pytest.mark.parametrize(
    ("offset", "length", "mode", "expected"),
    [
        (0, 4096, 0x00, errno.EOPNOTSUPP),
        (0, 4096, 0x01, errno.EOPNOTSUPP),
        (0, 4096, 0x08, errno.EOPNOTSUPP),
        (1, 4096, 0x03, errno.EINVAL),
        (0, 4095, 0x11, errno.EINVAL),
        (SIZE, 512, 0x11, errno.ENOSPC),
    ],
)
def test_what_fallocate_refuses(
    file: ExportedFile, offset: int, length: int, mode: int, expected: int
) -> None:
    with pytest.raises(OSError, check=lambda error: error.errno == expected):
        file.fallocate(offset, length, mode)


def test_requests_wait_only_while_the_file_is_stalled(file: ExportedFile) -> None:
    buffer = memoryview(bytearray(b"first"))
    write = Request(Opcode.WRITE, 1, 0, 512, 0, buffer)
    flush = Request(Opcode.FSYNC, 2, 0, 0, 0, memoryview(b""))
    assert not file.keep_for_later(write)
    file.stall()
    assert file.keep_for_later(write)
    buffer[:] = b"other"  # the worker reads its next request into it
    assert file.keep_for_later(flush)
    waiting = file.next_waiting()
    assert waiting is not None
    assert bytes(waiting.buffer) == b"first"
    assert file.next_waiting() == flush
    assert file.next_waiting() is None
    assert not file.keep_for_later(flush), "it is stalled no more"


def test_a_bug_of_the_target_is_reported_once(
    file: ExportedFile, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (RuntimeError("one"), RuntimeError("two"), KeyError("other")):
        file.report(error)
    assert [record.exc_info is not None for record in caplog.records] == [True, True]
