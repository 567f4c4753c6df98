"""On-disk structures of thin-pool metadata, version 2.  Layout only: no I/O, no policy.

Field order and names follow the kernel: `drivers/md/dm-thin-metadata.c` (superblock, device
details, packing of mappings), `persistent-data/dm-btree-internal.h` (node header) and
`persistent-data/dm-space-map-common.h` (space maps).  All integers are little-endian.  Nothing else
in the package knows an offset, a size or a salt.

`pack` and `unpack` are inverses; checksums are the business of `devmapper.thin.checksum`.
"""

import sys
from array import array
from collections.abc import Iterable
from enum import IntFlag
from struct import Struct
from typing import Final, Literal, NamedTuple, Self

from devmapper.errors import FormatError
from devmapper.units import SECTOR_SIZE, Bytes, Sectors, TransactionId

BLOCK_SIZE: Final = 4096  # THIN_METADATA_BLOCK_SIZE, in bytes
BLOCK_SECTORS: Final = BLOCK_SIZE // SECTOR_SIZE
SUPERBLOCK_LOCATION: Final = 0
MAGIC: Final = 27022010  # THIN_SUPERBLOCK_MAGIC
VERSION: Final = 2  # THIN_VERSION
MIN_VERSION: Final = 1
UUID_SIZE: Final = 16
SPACE_MAP_ROOT_SIZE: Final = 128
INCOMPAT_SUPPORTED: Final = 0  # THIN_FEATURE_INCOMPAT_SUPP
COMPAT_RO_SUPPORTED: Final = 0  # THIN_FEATURE_COMPAT_RO_SUPP
ZERO_BLOCK: Final = bytes(BLOCK_SIZE)

_TIME_BITS: Final = 24
MAX_TIME: Final = (1 << _TIME_BITS) - 1
MAX_KEY: Final = (1 << 64) - 1
_HOST_IS_BIG_ENDIAN: Final = sys.byteorder == "big"


class BlockKind(NamedTuple):
    """What a metadata block is; *salt* is XORed into its checksum."""

    name: str
    salt: int


SUPERBLOCK: Final = BlockKind("superblock", 160774)
BTREE_NODE: Final = BlockKind("btree node", 121107)
BITMAP: Final = BlockKind("space map bitmap", 240779)
METADATA_INDEX: Final = BlockKind("metadata index", 160478)
BLOCK_KINDS: Final = (SUPERBLOCK, BTREE_NODE, BITMAP, METADATA_INDEX)


_BLOCK_HEADER: Final = Struct("<IIQ")
CSUM_SIZE: Final = 4  # the checksum covers everything behind itself


class BlockHeader(NamedTuple):
    """The first 16 bytes that all four kinds of block have in common."""

    csum: int  # __le32
    flags: int  # __le32
    blocknr: int  # __le64

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Self:
        return cls._make(_BLOCK_HEADER.unpack_from(raw))


def with_csum(raw: bytes, csum: int) -> bytes:
    """Return the block with its checksum field replaced."""
    return csum.to_bytes(CSUM_SIZE, "little") + raw[CSUM_SIZE:]


class SuperblockFlags(IntFlag):
    """`THIN_METADATA_NEEDS_CHECK_FLAG` is the only one."""

    NEEDS_CHECK = 1


_SUPERBLOCK: Final = Struct("<IIQ16sQIIQQ128s128sQQIIQIII")


class Superblock(NamedTuple):
    """`struct thin_disk_superblock`."""

    csum: int  # __le32
    flags: int  # __le32
    blocknr: int  # __le64
    uuid: bytes  # __u8[16]
    magic: int  # __le64
    version: int  # __le32
    time: int  # __le32
    trans_id: TransactionId  # __le64
    held_root: int  # __le64
    data_space_map_root: bytes  # __u8[128]
    metadata_space_map_root: bytes  # __u8[128]
    data_mapping_root: int  # __le64
    device_details_root: int  # __le64
    data_block_size: Sectors  # __le32, in sectors
    metadata_block_size: Sectors  # __le32, in sectors
    metadata_nr_blocks: int  # __le64
    compat_flags: int  # __le32
    compat_ro_flags: int  # __le32
    incompat_flags: int  # __le32

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Self:
        return cls._make(_SUPERBLOCK.unpack_from(raw))

    def pack(self) -> bytes:
        """The whole block; its checksum field still has to be sealed."""
        return _SUPERBLOCK.pack(*self).ljust(BLOCK_SIZE, b"\0")

    @property
    def needs_check(self) -> bool:
        return bool(self.flags & SuperblockFlags.NEEDS_CHECK)

    @property
    def block_size(self) -> Bytes:
        """Size of a data block in bytes."""
        return Bytes(self.data_block_size * SECTOR_SIZE)


_SPACE_MAP_ROOT: Final = Struct("<QQQQ")


class SpaceMapRoot(NamedTuple):
    """`struct disk_sm_root`, the start of each 128-byte space map root in the superblock."""

    nr_blocks: int  # __le64
    nr_allocated: int  # __le64
    bitmap_root: int  # __le64
    ref_count_root: int  # __le64

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Self:
        return cls._make(_SPACE_MAP_ROOT.unpack_from(raw))

    def pack(self) -> bytes:
        """All 128 bytes, as they stand in the superblock."""
        return _SPACE_MAP_ROOT.pack(*self).ljust(SPACE_MAP_ROOT_SIZE, b"\0")


_INDEX_ENTRY: Final = Struct("<QII")


class IndexEntry(NamedTuple):
    """`struct disk_index_entry`: where a bitmap is and a summary of it."""

    blocknr: int  # __le64
    nr_free: int  # __le32, of ENTRIES_PER_BITMAP even where the device ends inside the bitmap
    none_free_before: int  # __le32, a hint

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Self:
        return cls._make(_INDEX_ENTRY.unpack(raw))

    def pack(self) -> bytes:
        return _INDEX_ENTRY.pack(*self)


INDEX_ENTRY_SIZE: Final = _INDEX_ENTRY.size
MAX_METADATA_BITMAPS: Final = 255


class MetadataIndex(NamedTuple):
    """`struct disk_metadata_index`: the root of the metadata space map, one block."""

    csum: int  # __le32
    padding: int  # __le32
    blocknr: int  # __le64
    entries: tuple[IndexEntry, ...]  # index[255], zeros behind the last bitmap

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Self:
        csum, padding, blocknr = _BLOCK_HEADER.unpack_from(raw)
        entries = _INDEX_ENTRY.iter_unpack(raw[_BLOCK_HEADER.size : BLOCK_SIZE])
        return cls(csum, padding, blocknr, tuple(map(IndexEntry._make, entries)))

    def pack(self) -> bytes:
        packed = b"".join(entry.pack() for entry in self.entries)
        header = _BLOCK_HEADER.pack(self.csum, self.padding, self.blocknr)
        return (header + packed).ljust(BLOCK_SIZE, b"\0")


# A bitmap is a header and two bits per entry: bit 2n is the high bit of the count of entry n, bit
# 2n+1 the low one.
ENTRIES_PER_BYTE: Final = 4
ENTRIES_PER_BITMAP: Final = (BLOCK_SIZE - _BLOCK_HEADER.size) * ENTRIES_PER_BYTE
MAX_METADATA_BLOCKS: Final = MAX_METADATA_BITMAPS * ENTRIES_PER_BITMAP
OVERFLOW_COUNT: Final = 3  # the bitmap's way to say: look in the ref count tree
_COUNT_OF_PAIR: Final = (0, 2, 1, 3)
_PAIR_OF_COUNT: Final = (0, 2, 1, 3)
_UNPACK_TABLES: Final = tuple(
    bytes(_COUNT_OF_PAIR[byte >> 2 * place & 3] for byte in range(256))
    for place in range(ENTRIES_PER_BYTE)
)
_PACK_TABLES: Final = tuple(
    bytes((_PAIR_OF_COUNT[count] if count < 4 else 0) << 2 * place for count in range(256))
    for place in range(ENTRIES_PER_BYTE)
)


def unpack_bitmap(raw: bytes) -> bytearray:
    """Counts (0 to 3) of a bitmap block, one byte each."""
    body = raw[_BLOCK_HEADER.size : BLOCK_SIZE]
    counts = bytearray(ENTRIES_PER_BITMAP)
    for place, table in enumerate(_UNPACK_TABLES):
        counts[place::ENTRIES_PER_BYTE] = body.translate(table)
    return counts


def pack_bitmap(blocknr: int, counts: bytearray) -> bytes:
    """The bitmap block of ENTRIES_PER_BITMAP counts; values above 3 are stored as 0."""
    merged = 0
    for place, table in enumerate(_PACK_TABLES):
        merged |= int.from_bytes(counts[place::ENTRIES_PER_BYTE].translate(table), "little")
    body = merged.to_bytes(BLOCK_SIZE - _BLOCK_HEADER.size, "little")
    return _BLOCK_HEADER.pack(0, 0, blocknr) + body


_DEVICE_DETAILS: Final = Struct("<QQII")


class DeviceDetails(NamedTuple):
    """Value of the device details tree, keyed by thin id (`struct disk_device_details`)."""

    mapped_blocks: int  # __le64
    transaction_id: TransactionId  # __le64
    creation_time: int  # __le32
    snapshotted_time: int  # __le32

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Self:
        return cls._make(_DEVICE_DETAILS.unpack(raw))

    def pack(self) -> bytes:
        return _DEVICE_DETAILS.pack(*self)


class Mapping(NamedTuple):
    """Value of a bottom mapping tree: the data block, and the pool's time when it was mapped."""

    data_block: int  # 40 bit
    time: int  # 24 bit


def pack_mapping(data_block: int, time: int) -> int:
    return data_block << _TIME_BITS | time & MAX_TIME


def unpack_mapping(packed: int) -> Mapping:
    return Mapping(packed >> _TIME_BITS, packed & MAX_TIME)


def data_blocks(packed: Iterable[int]) -> list[int]:
    """The data blocks of packed mappings."""
    return [value >> _TIME_BITS for value in packed]


class NodeFlags(IntFlag):
    """A node is exactly one of them."""

    INTERNAL = 1
    LEAF = 2


_NODE_HEADER: Final = Struct("<IIQIIII")
NODE_HEADER_SIZE: Final = _NODE_HEADER.size
KEY_SIZE: Final = 8
U64_SIZE: Final = 8
REF_COUNT_SIZE: Final = 4
MAPPING_SIZE: Final = U64_SIZE
DEVICE_DETAILS_SIZE: Final = _DEVICE_DETAILS.size
UNMAPPED: Final = (1 << 64) - 1  # no packed mapping: a data block has 40 bits, and not all ones
MAX_BTREE_DEPTH: Final = 17  # of 2**64 keys, with nodes a third full; more is a loop


class NodeHeader(NamedTuple):
    """`struct node_header`; the keys follow, as many as max_entries, then the values."""

    csum: int  # __le32
    flags: int  # __le32, NodeFlags
    blocknr: int  # __le64
    nr_entries: int  # __le32
    max_entries: int  # __le32
    value_size: int  # __le32
    padding: int  # __le32

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Self:
        return cls._make(_NODE_HEADER.unpack_from(raw))

    def pack(self) -> bytes:
        return _NODE_HEADER.pack(*self)

    @property
    def is_leaf(self) -> bool:
        return self.flags == NodeFlags.LEAF

    def check(self, block: int) -> None:
        """Raise `FormatError` where the header alone makes the entries unreadable."""
        if self.flags not in (NodeFlags.INTERNAL, NodeFlags.LEAF):
            raise FormatError(block, "flags of the node", want="1 or 2", got=self.flags)
        if not self.is_leaf and self.value_size != U64_SIZE:
            raise FormatError(block, "value_size", want=U64_SIZE, got=self.value_size)
        fits = (BLOCK_SIZE - NODE_HEADER_SIZE) // (KEY_SIZE + self.value_size)
        if not 3 <= self.max_entries <= fits:
            raise FormatError(block, "max_entries", want=f"3 to {fits}", got=self.max_entries)
        if self.nr_entries > self.max_entries:
            want = f"at most {self.max_entries}"
            raise FormatError(block, "nr_entries", want=want, got=self.nr_entries)


def max_entries(value_size: int) -> int:
    """How many entries a new node gets; a multiple of three (`dm-btree.c: calc_max_entries`)."""
    return (BLOCK_SIZE - NODE_HEADER_SIZE) // (KEY_SIZE + value_size) // 3 * 3


def min_entries(limit: int) -> int:
    """How full a node other than the root must at least be (`dm-btree-remove.c`)."""
    return limit // 3


def unpack_u64s(raw: bytes | memoryview) -> "array[int]":
    """Little-endian 64-bit integers, whatever the host is."""
    return _unpack_array("Q", raw)


def pack_u64s(numbers: "array[int]") -> bytes:
    return _pack_array(numbers)


def unpack_u32s(raw: bytes | memoryview) -> "array[int]":
    """Little-endian 32-bit integers, whatever the host is."""
    return _unpack_array("I", raw)


def pack_u32s(numbers: "array[int]") -> bytes:
    return _pack_array(numbers)


def _unpack_array(code: Literal["I", "Q"], raw: bytes | memoryview) -> "array[int]":
    numbers = array(code, bytes(raw))
    if _HOST_IS_BIG_ENDIAN:
        numbers.byteswap()
    return numbers


def _pack_array(numbers: "array[int]") -> bytes:
    if _HOST_IS_BIG_ENDIAN:
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def node_keys(header: NodeHeader, raw: bytes) -> "array[int]":
    """The keys in use of a node whose header has been checked."""
    return unpack_u64s(raw[NODE_HEADER_SIZE : NODE_HEADER_SIZE + header.nr_entries * KEY_SIZE])


def node_values(header: NodeHeader, raw: bytes) -> bytes:
    """The values in use of a node whose header has been checked, one behind the other."""
    start = NODE_HEADER_SIZE + header.max_entries * KEY_SIZE
    return raw[start : start + header.nr_entries * header.value_size]


def pack_node(header: NodeHeader, keys: bytes, values: bytes) -> bytes:
    """The whole block; its checksum field still has to be sealed."""
    head = (header.pack() + keys).ljust(NODE_HEADER_SIZE + header.max_entries * KEY_SIZE, b"\0")
    return (head + values).ljust(BLOCK_SIZE, b"\0")
