"""Where ext4 keeps an inode: the group descriptors say where the table of its group begins.

Layout: `fs/ext4/ext4.h` (`struct ext4_super_block`, `struct ext4_group_desc`) and
`fs/ext4/super.c: descriptor_loc`.  Reads the superblock and the descriptors, nothing else.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from struct import Struct, unpack_from
from typing import BinaryIO, Final, NamedTuple

from devmapper.layerdiff.inode_ranges import END_OF_INODES, ByteRange, InodeRange

_OFFSET: Final = 1024
_LENGTH: Final = 1024
_MAGIC: Final = 0xEF53
# Offset in the superblock and format of each field
_FIELDS: Final = {
    "blocks_count_lo": (0x4, "I"),
    "first_data_block": (0x14, "I"),
    "log_block_size": (0x18, "I"),
    "blocks_per_group": (0x20, "I"),
    "inodes_per_group": (0x28, "I"),
    "magic": (0x38, "H"),
    "lastcheck": (0x40, "I"),
    "rev_level": (0x4C, "I"),
    "inode_size": (0x58, "H"),
    "feature_compat": (0x5C, "I"),
    "feature_incompat": (0x60, "I"),
    "feature_ro_compat": (0x64, "I"),
    "desc_size": (0xFE, "H"),
    "first_meta_bg": (0x104, "I"),
    "blocks_count_hi": (0x150, "I"),
    "backup_bg_0": (0x24C, "I"),
    "backup_bg_1": (0x250, "I"),
}
_COMPAT_SPARSE_SUPER2: Final = 0x200
_RO_COMPAT_SPARSE_SUPER: Final = 0x1
_INCOMPAT_META_BG: Final = 0x10
_INCOMPAT_64BIT: Final = 0x80
# filetype, recover, meta_bg, extents, 64bit, flex_bg, csum_seed, largedir.  With any other one the
# content of a directory or of an attribute may change without its inode, for all we know.
_INCOMPAT_KNOWN: Final = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x200 | 0x2000 | 0x4000
_MOST_GROUPS: Final = 1 << 21  # 256 TiB of 128 MiB groups; more is damage
_TABLE_LO: Final = 0x8  # bg_inode_table_lo
_TABLE_HI: Final = 0x28  # bg_inode_table_hi
_U32: Final = Struct("<I")


class _Superblock(NamedTuple):
    """The fields of `_FIELDS`, by their kernel's names without `s_`."""

    blocks_count_lo: int
    first_data_block: int
    log_block_size: int
    blocks_per_group: int
    inodes_per_group: int
    magic: int
    lastcheck: int
    rev_level: int
    inode_size: int
    feature_compat: int
    feature_incompat: int
    feature_ro_compat: int
    desc_size: int
    first_meta_bg: int
    blocks_count_hi: int
    backup_bg_0: int
    backup_bg_1: int

    @property
    def block_size(self) -> int:
        return 1024 << self.log_block_size

    @property
    def has_64bit(self) -> bool:
        return bool(self.feature_incompat & _INCOMPAT_64BIT)

    @property
    def blocks(self) -> int:
        return self.blocks_count_lo | (self.blocks_count_hi << 32 if self.has_64bit else 0)

    @property
    def groups(self) -> int:
        return -(-(self.blocks - self.first_data_block) // self.blocks_per_group)

    @property
    def bytes_per_inode(self) -> int:
        return self.inode_size if self.rev_level else 128

    @property
    def bytes_per_descriptor(self) -> int:
        return self.desc_size if self.has_64bit else 32

    def makes_sense(self) -> bool:
        return (
            self.magic == _MAGIC
            and not self.feature_incompat & ~_INCOMPAT_KNOWN
            and self.log_block_size <= 6
            and self.blocks_per_group > 0
            and self.inodes_per_group > 0
            and 0 < self.groups <= _MOST_GROUPS
            and 128 <= self.bytes_per_inode <= self.block_size
            and 32 <= self.bytes_per_descriptor <= self.block_size
            and (not self.has_64bit or self.bytes_per_descriptor >= _TABLE_HI + _U32.size)
        )


class Ext4Inodes:
    """The inode tables of one ext4."""

    def __init__(self, superblock: _Superblock, tables: list[int]) -> None:
        self._superblock = superblock
        self._tables = tables  # by group, in bytes from the beginning of the device
        self._groups = sorted(range(len(tables)), key=tables.__getitem__)
        self._ascending = sorted(tables)

    def differing(self, other: "Ext4Inodes") -> list[InodeRange] | None:
        """Inodes of groups that only one of the two has, or whose tables are not at one place.

        None if groups or inodes have other sizes, or if a file system check has run on one of the
        two since they parted: it may have mended a directory and left the inode alone.
        """
        ours, theirs = self._superblock, other._superblock
        if _shape(ours) != _shape(theirs):
            return None
        per_group = ours.inodes_per_group
        common = min(len(self._tables), len(other._tables))
        found = [
            InodeRange(1 + group * per_group, 1 + (group + 1) * per_group)
            for group in range(common)
            if self._tables[group] != other._tables[group]
        ]
        return [*found, InodeRange(1 + common * per_group, END_OF_INODES)]

    def inodes_in(self, changed: Iterable[ByteRange]) -> Iterator[InodeRange]:
        """Inodes of which at least one byte lies in one of *changed*."""
        size = self._superblock.bytes_per_inode
        per_group = self._superblock.inodes_per_group
        length = per_group * size
        for begin, end in changed:
            at = bisect_right(self._ascending, begin - length)  # the first that ends behind it
            while at < len(self._ascending) and (table := self._ascending[at]) < end:
                zeroth = 1 + self._groups[at] * per_group
                first = max(begin - table, 0) // size
                last = -(-min(end - table, length) // size)
                yield InodeRange(zeroth + first, zeroth + last)
                at += 1


def read_ext4(device: BinaryIO) -> Ext4Inodes | None:
    """The places on *device*; None where something is not known to this module."""
    device.seek(_OFFSET)
    raw = device.read(_LENGTH)
    if len(raw) < _LENGTH:
        return None
    values = {
        name: unpack_from("<" + kind, raw, offset)[0] for name, (offset, kind) in _FIELDS.items()
    }
    superblock = _Superblock(**values)
    if not superblock.makes_sense():
        return None
    return Ext4Inodes(superblock, _read_tables(device, superblock))


def _shape(superblock: _Superblock) -> tuple[int, ...]:
    """What has to be equal for an inode's number to mean the same place."""
    return (
        superblock.block_size,
        superblock.first_data_block,
        superblock.blocks_per_group,
        superblock.inodes_per_group,
        superblock.bytes_per_inode,
        superblock.lastcheck,
    )


def _read_tables(device: BinaryIO, superblock: _Superblock) -> list[int]:
    size = superblock.bytes_per_descriptor
    per_block = superblock.block_size // size
    tables: list[int] = []
    for number in range(-(-superblock.groups // per_block)):
        device.seek(_descriptor_block(superblock, number, per_block) * superblock.block_size)
        raw = device.read(superblock.block_size)
        for at in range(0, min(per_block, superblock.groups - len(tables)) * size, size):
            (block,) = _U32.unpack_from(raw, at + _TABLE_LO)
            if superblock.has_64bit:
                block |= _U32.unpack_from(raw, at + _TABLE_HI)[0] << 32
            tables.append(block * superblock.block_size)
    return tables


def _descriptor_block(superblock: _Superblock, number: int, per_block: int) -> int:
    """The block with descriptors *number* times *per_block* and on."""
    has_meta_bg = superblock.feature_incompat & _INCOMPAT_META_BG
    if not has_meta_bg or number < superblock.first_meta_bg:
        return _OFFSET // superblock.block_size + number + 1
    group = number * per_block
    after = int(_has_superblock(superblock, group))
    if superblock.block_size == 1024 and number == 0 and superblock.first_data_block == 0:
        after += 1
    return after + superblock.first_data_block + group * superblock.blocks_per_group


def _has_superblock(superblock: _Superblock, group: int) -> bool:
    """fs/ext4/balloc.c: ext4_bg_has_super."""
    if group == 0:
        return True
    if superblock.feature_compat & _COMPAT_SPARSE_SUPER2:
        return group in (superblock.backup_bg_0, superblock.backup_bg_1)
    if group == 1 or not superblock.feature_ro_compat & _RO_COMPAT_SPARSE_SUPER:
        return True
    return any(_is_power(group, base) for base in (3, 5, 7))


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1
