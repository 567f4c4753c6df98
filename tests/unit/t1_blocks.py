import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmapper.errors import ChecksumError, FormatError
from devmapper.thin import checksum
from devmapper.thin import format as layout
from devmapper.thin.blocks import FileDevice, MemoryDevice

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


def test_crc32c_known_answer() -> None:
    assert checksum.crc32c_reference(b"123456789") == 0xE3069283
    assert checksum.crc32c(b"123456789") == 0xE3069283


@given(st.binary(max_size=200))
def test_crc32c_equals_the_reference(data):
    assert checksum.crc32c(data) == checksum.crc32c_reference(data)


@given(st.tuples(u64, u64, u32, u32))
def test_device_details_round_trip(fields):
    details = layout.DeviceDetails._make(fields)
    assert layout.DeviceDetails.unpack(details.pack()) == details


@given(st.tuples(u64, u64, u64, u64))
def test_space_map_root_round_trip(fields):
    root = layout.SpaceMapRoot._make(fields)
    assert len(root.pack()) == layout.SPACE_MAP_ROOT_SIZE
    assert layout.SpaceMapRoot.unpack(root.pack()) == root


@given(st.integers(0, 2**40 - 1), st.integers(0, 2**24 - 1))
def test_mapping_round_trip(data_block, time):
    packed = layout.pack_mapping(data_block, time)
    assert layout.unpack_mapping(packed) == (data_block, time)
    assert layout.data_blocks([packed]) == [data_block]


def test_bitmap_round_trip() -> None:
    counts = bytearray(random.Random(5).choices(range(4), k=layout.ENTRIES_PER_BITMAP))
    assert layout.unpack_bitmap(layout.pack_bitmap(9, counts)) == counts


def test_bits_of_a_bitmap_stand_where_the_kernel_looks_for_them() -> None:
    counts = bytearray(layout.ENTRIES_PER_BITMAP)
    counts[0], counts[1], counts[2], counts[5] = 1, 2, 3, 1
    body = layout.pack_bitmap(7, counts)[16:]
    bit = [body[n // 8] >> n % 8 & 1 for n in range(16)]
    assert bit[:6] == [0, 1, 1, 0, 1, 1]  # high bit first
    assert bit[10:12] == [0, 1]


def test_metadata_index_round_trip() -> None:
    entries = tuple(layout.IndexEntry(n, n + 1, n + 2) for n in range(255))
    index = layout.MetadataIndex(1, 0, 5, entries)
    assert layout.MetadataIndex.unpack(index.pack()) == index
    assert len(index.pack()) == layout.BLOCK_SIZE


@pytest.mark.parametrize(
    ("value_size", "entries"), [(8, 252), (4, 336), (16, 168), (24, 126), (1, 450)]
)
def test_max_entries(value_size, entries):
    assert layout.max_entries(value_size) == entries


@pytest.mark.parametrize("kind", layout.BLOCK_KINDS, ids=lambda kind: kind.name)
def test_a_sealed_block_passes_and_no_changed_one_does(kind):
    raw = checksum.seal(layout.pack_bitmap(17, bytearray(layout.ENTRIES_PER_BITMAP)), kind)
    checksum.check_block(raw, kind, 17)
    for at in (0, 4, 8, 100, 4095):
        damaged = bytearray(raw)
        damaged[at] ^= 0x10
        with pytest.raises(ChecksumError) as caught:
            checksum.check_block(bytes(damaged), kind, 17)
        assert caught.value.block == 17
    with pytest.raises(FormatError, match="blocknr"):
        checksum.check_block(raw, kind, 18)
    for other in set(layout.BLOCK_KINDS) - {kind}:
        with pytest.raises(ChecksumError):
            checksum.check_block(raw, other, 17)


@pytest.fixture(params=["file", "memory"])
def device(request, tmp_path):
    if request.param == "memory":
        made: MemoryDevice | FileDevice = MemoryDevice(4)
    else:
        path = tmp_path / "metadata"
        path.touch()
        os.truncate(path, 4 * layout.BLOCK_SIZE)
        made = FileDevice.open(path)
    yield made
    made.close()
    made.close()


def test_a_device_gives_back_what_was_written(device):
    data = bytes(range(256)) * 16
    device.write(3, data)
    device.flush()
    assert device.nr_blocks == 4
    assert device.read(3) == data
    assert device.read(2) == layout.ZERO_BLOCK


@pytest.mark.parametrize("block", [-1, 4, 2**60])
def test_a_device_refuses_blocks_outside(device, block):
    with pytest.raises(OSError, match="block"):
        device.read(block)
    with pytest.raises(OSError, match="block"):
        device.write(block, layout.ZERO_BLOCK)


def test_a_device_refuses_half_a_block(device):
    with pytest.raises(OSError, match="not a metadata block"):
        device.write(0, b"short")


def test_a_file_beyond_the_cap_is_used_up_to_the_cap(tmp_path):
    path = tmp_path / "metadata"
    path.touch()
    os.truncate(path, 17 * 1024**3)
    with FileDevice.open(path, read_only=True) as device:
        assert device.nr_blocks == 255 * 16320
        with pytest.raises(OSError, match="Bad file descriptor"):
            device.write(0, layout.ZERO_BLOCK)


def test_a_file_grows_under_an_open_device(device, tmp_path):
    if isinstance(device, MemoryDevice):
        device.nr_blocks = 6
    else:
        os.truncate(tmp_path / "metadata", 6 * layout.BLOCK_SIZE)
    assert device.nr_blocks == 6


def test_neither_file_nor_block_device(tmp_path):
    with pytest.raises(OSError, match=r"neither|directory"):
        FileDevice.open(tmp_path)
    with pytest.raises(OSError, match="neither"):
        FileDevice.open(tmp_path / ".." / "..", read_only=True)
