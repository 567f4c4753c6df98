"""Builds any metadata, valid or damaged, from a literal: XML for thin_restore, then bytes.

A patch of a field re-computes the checksum of its block, so that the field is what is wrong.
Knows the format by itself, not through the package: struct offsets are spelled out on purpose.
"""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple, Self

from tests.support.thin_tools import thin_restore

BLOCK: Final = 4096
SUPERBLOCK_SALT: Final = 160774
NODE_SALT: Final = 121107
BITMAP_SALT: Final = 240779
INDEX_SALT: Final = 160478
KEYS_AT: Final = 32  # in a node
ENTRIES_PER_BITMAP: Final = (BLOCK - 16) * 4
METADATA_SIZE: Final = 4 << 20

# offsets in the superblock
FLAGS_AT: Final = 4
MAGIC_AT: Final = 32
VERSION_AT: Final = 40
TRANS_ID_AT: Final = 48
HELD_ROOT_AT: Final = 56
DATA_SM_AT: Final = 64
METADATA_SM_AT: Final = 192
MAPPING_ROOT_AT: Final = 320
DETAILS_ROOT_AT: Final = 328
DATA_BLOCK_SIZE_AT: Final = 336
METADATA_BLOCK_SIZE_AT: Final = 340
METADATA_NR_BLOCKS_AT: Final = 344
INCOMPAT_AT: Final = 360


class Run(NamedTuple):
    """*length* thin blocks from *origin* on, mapped to data blocks from *data* on."""

    origin: int
    data: int
    length: int = 1
    time: int = 0


class Thin(NamedTuple):
    """A thin device to build; *mapped_blocks* may lie."""

    runs: tuple[Run, ...] = ()
    transaction: int = 0
    creation_time: int = 0
    snap_time: int = 0
    mapped_blocks: int | None = None


def pool_xml(
    thins: Mapping[int, Thin],
    *,
    nr_data_blocks: int = 65536,
    transaction: int = 7,
    time: int = 3,
    block_sectors: int = 128,
) -> str:
    """The XML of a pool, in the words of thin_restore."""
    head = f'<superblock uuid="" time="{time}" transaction="{transaction}" flags="0" version="2"'
    lines = [f'{head} data_block_size="{block_sectors}" nr_data_blocks="{nr_data_blocks}">']
    for thin_id, thin in sorted(thins.items()):
        mapped = thin.mapped_blocks
        if mapped is None:
            mapped = sum(run.length for run in thin.runs)
        lines.append(
            f'<device dev_id="{thin_id}" mapped_blocks="{mapped}"'
            f' transaction="{thin.transaction}" creation_time="{thin.creation_time}"'
            f' snap_time="{thin.snap_time}">'
        )
        lines += (
            f'<range_mapping origin_begin="{run.origin}" data_begin="{run.data}"'
            f' length="{run.length}" time="{run.time}"/>'
            for run in thin.runs
        )
        lines.append("</device>")
    return "\n".join([*lines, "</superblock>", ""])


def build(path: Path, xml: str, *, size: int = METADATA_SIZE) -> "Image":
    """Make a metadata device of *size* bytes with thin_restore."""
    source = path.with_suffix(".restore.xml")
    source.write_text(xml)
    thin_restore(source, path, size)
    return Image(path)


def crc32c(data: bytes) -> int:
    """crc32c without the last inversion: as the kernel stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


class Image:
    """A metadata device as a file to be patched, block by block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def copy(self, path: Path) -> Self:
        path.write_bytes(self.path.read_bytes())
        return type(self)(path)

    def read(self, block: int) -> bytearray:
        with self.path.open("rb") as file:
            file.seek(block * BLOCK)
            return bytearray(file.read(BLOCK))

    def write(self, block: int, raw: bytearray, salt: int | None = None) -> None:
        """Write a block; with a *salt* its checksum is made right."""
        if salt is not None:
            raw[:4] = struct.pack("<I", crc32c(bytes(raw[4:])) ^ salt)
        with self.path.open("r+b") as file:
            file.seek(block * BLOCK)
            file.write(raw)

    def flip(self, block: int, offset: int, mask: int = 1) -> None:
        """Flip bits without making the checksum right."""
        raw = self.read(block)
        raw[offset] ^= mask
        self.write(block, raw)

    def u32(self, block: int, offset: int) -> int:
        value: int = struct.unpack_from("<I", self.read(block), offset)[0]
        return value

    def u64(self, block: int, offset: int) -> int:
        value: int = struct.unpack_from("<Q", self.read(block), offset)[0]
        return value

    def set_u32(self, block: int, offset: int, value: int, salt: int) -> None:
        self._set("<I", block, offset, value, salt)

    def set_u64(self, block: int, offset: int, value: int, salt: int) -> None:
        self._set("<Q", block, offset, value, salt)

    def _set(self, form: str, block: int, offset: int, value: int, salt: int) -> None:
        raw = self.read(block)
        struct.pack_into(form, raw, offset, value)
        self.write(block, raw, salt)

    # where things are

    @property
    def mapping_root(self) -> int:
        return self.u64(0, MAPPING_ROOT_AT)

    @property
    def details_root(self) -> int:
        return self.u64(0, DETAILS_ROOT_AT)

    @property
    def metadata_index(self) -> int:
        return self.u64(0, METADATA_SM_AT + 16)

    @property
    def data_index(self) -> int:
        return self.u64(0, DATA_SM_AT + 16)

    @property
    def data_ref_counts(self) -> int:
        return self.u64(0, DATA_SM_AT + 24)

    def metadata_bitmap(self, at: int = 0) -> int:
        return self.u64(self.metadata_index, 16 + 16 * at)

    def data_bitmap(self, at: int = 0) -> int:
        return self.u64(self.data_index, self.value_at(self.data_index, at, 16))

    def value_at(self, node: int, at: int, size: int = 8) -> int:
        """Where value *at* of a node is in its block."""
        return KEYS_AT + 8 * self.u32(node, 20) + size * at

    def thin_root(self, thin_id: int) -> int:
        """The root of the mappings of a thin device, by a walk down the top level."""
        block = self.mapping_root
        while True:
            keys = struct.unpack_from(f"<{self.u32(block, 16)}Q", self.read(block), KEYS_AT)
            at = max(i for i, key in enumerate(keys) if key <= thin_id)
            value = self.u64(block, self.value_at(block, at))
            if self.u32(block, 4) == 2:
                assert keys[at] == thin_id
                return value
            block = value

    def first_leaf(self, root: int) -> int:
        while self.u32(root, 4) == 1:
            root = self.u64(root, self.value_at(root, 0))
        return root

    # what can be wrong

    def bitmap_count(self, bitmap: int, entry: int) -> int:
        pair = self.read(bitmap)[16 + entry // 4] >> entry % 4 * 2 & 3
        return (0, 2, 1, 3)[pair]

    def set_bitmap_count(self, bitmap: int, entry: int, count: int) -> None:
        """Set the reference count (0 to 3) of one entry of a bitmap."""
        raw = self.read(bitmap)
        shift = entry % 4 * 2
        pair = (0, 2, 1, 3)[count]
        raw[16 + entry // 4] = raw[16 + entry // 4] & ~(3 << shift) | pair << shift
        self.write(bitmap, raw, BITMAP_SALT)

    def hold_metadata_snap(self) -> int:
        """Make a metadata snap as the kernel does: a superblock that shares the trees."""
        bitmap = self.metadata_bitmap()
        block = next(i for i in range(ENTRIES_PER_BITMAP) if not self.bitmap_count(bitmap, i))
        held = self.read(0)
        struct.pack_into("<Q", held, 8, block)
        held[DATA_SM_AT : DATA_SM_AT + 256] = bytes(256)
        self.write(block, held, SUPERBLOCK_SALT)
        self.set_u64(0, HELD_ROOT_AT, block, SUPERBLOCK_SALT)
        self.set_bitmap_count(bitmap, block, 1)
        for root in (self.mapping_root, self.details_root):
            self.set_bitmap_count(bitmap, root, self.bitmap_count(bitmap, root) + 1)
        self._allocated_metadata(1)
        return block

    def _allocated_metadata(self, blocks: int) -> None:
        at = METADATA_SM_AT + 8
        self.set_u64(0, at, self.u64(0, at) + blocks, SUPERBLOCK_SALT)
        index = self.metadata_index
        self.set_u32(index, 24, self.u32(index, 24) - blocks, INDEX_SALT)

    def truncate(self, blocks: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(blocks * BLOCK)


def runs(*spans: Iterable[int]) -> tuple[Run, ...]:
    """Runs from (origin, data, length, time) tuples."""
    return tuple(Run(*span) for span in spans)
