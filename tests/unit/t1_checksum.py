"""Checksums of metadata blocks, against published values and against what thin_restore wrote."""

from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmapper.errors import ChecksumError, FormatError
from devmapper.thin import checksum
from devmapper.thin.format import BITMAP, BLOCK_KINDS, BLOCK_SIZE, BTREE_NODE, SUPERBLOCK
from tests.support.fixtures import unpack_image


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc32c_equals_published_values(data: bytes, crc: int) -> None:
    assert checksum.crc32c_reference(data) == crc
    assert checksum.crc32c(data) == crc


@given(st.binary(max_size=200))
def test_crc32c_of_the_library_equals_the_reference(data: bytes) -> None:
    assert google_crc32c.value(data) == checksum.crc32c_reference(data)


def test_a_sealed_block_passes_and_each_flipped_bit_does_not() -> None:
    raw = checksum.seal(bytes(8) + (7).to_bytes(8, "little") + bytes(BLOCK_SIZE - 16), BITMAP)
    checksum.check_block(raw, BITMAP, 7)
    for at in (0, 3, 4, 16, BLOCK_SIZE - 1):
        damaged = bytearray(raw)
        damaged[at] ^= 0x80
        with pytest.raises(ChecksumError) as caught:
            checksum.check_block(bytes(damaged), BITMAP, 7)
        assert caught.value.block == 7
        assert caught.value.kind == BITMAP.name


def test_a_block_of_one_kind_is_not_one_of_another() -> None:
    for kind in BLOCK_KINDS:
        raw = checksum.seal(bytes(BLOCK_SIZE), kind)
        for other in BLOCK_KINDS:
            if other != kind:
                with pytest.raises(ChecksumError):
                    checksum.check_block(raw, other, 0)


def test_a_block_that_was_written_elsewhere_is_found() -> None:
    raw = checksum.seal(bytes(BLOCK_SIZE), BTREE_NODE)
    with pytest.raises(FormatError) as caught:
        checksum.check_block(raw, BTREE_NODE, 9)
    assert (caught.value.block, caught.value.want, caught.value.got) == (9, 9, 0)


def test_the_superblock_of_thin_restore_passes(tmp_path: Path) -> None:
    raw = unpack_image("snapshots", tmp_path).read_bytes()[:BLOCK_SIZE]
    checksum.check_block(raw, SUPERBLOCK, 0)
    assert checksum.seal(raw, SUPERBLOCK) == raw
