"""Where xfs keeps an inode: its number says it, in units that the superblock gives.

Layout: `fs/xfs/libxfs/xfs_format.h` (`struct xfs_dsb`, XFS_INO_TO_AGNO and its siblings).  A number
is the allocation group, the block in it and the place in the block, each in bits of its own, so
numbers ascend as bytes of the device do.
"""

from collections.abc import Iterable, Iterator
from struct import Struct
from typing import BinaryIO, Final, NamedTuple

from devmapper.layerdiff.inode_ranges import END_OF_INODES, ByteRange, InodeRange

# sb_magicnum, sb_blocksize; sb_agblocks, sb_agcount; sb_versionnum, sb_sectsize, sb_inodesize,
# sb_inopblock; sb_blocklog, sb_sectlog, sb_inodelog, sb_inopblog, sb_agblklog
_SUPERBLOCK: Final = Struct(">4sI76xII8xHHHH12xBBBBB")
_INCOMPAT_OFFSET: Final = 216  # sb_features_incompat
_U32: Final = Struct(">I")
_LENGTH: Final = 512
_MAGIC: Final = b"XFSB"
_VERSION_MASK: Final = 0xF
_VERSIONS: Final = (4, 5)
# ftype, spinodes, meta_uuid, bigtime, nrext64, exchange, parent
_INCOMPAT_KNOWN: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80


class _Superblock(NamedTuple):
    magic: bytes
    block_size: int
    group_blocks: int
    groups: int
    version: int
    sector_size: int
    inode_size: int
    inodes_per_block: int
    block_log: int
    sector_log: int
    inode_log: int
    inodes_per_block_log: int
    group_blocks_log: int

    def makes_sense(self) -> bool:
        return (
            self.magic == _MAGIC
            and self.version & _VERSION_MASK in _VERSIONS
            and 9 <= self.block_log <= 16
            and self.block_size == 1 << self.block_log
            and self.inode_size == 1 << self.inode_log
            and self.inodes_per_block == 1 << self.inodes_per_block_log
            and self.inodes_per_block_log == self.block_log - self.inode_log
            and 0 < self.group_blocks <= 1 << self.group_blocks_log
            and self.group_blocks_log <= 31
            and self.groups > 0
        )


class XfsInodes:
    """The inodes of one xfs."""

    def __init__(self, superblock: _Superblock) -> None:
        self._superblock = superblock

    def differing(self, other: "XfsInodes") -> list[InodeRange] | None:
        """Inodes of groups that only one of the two has; None if groups have other sizes."""
        ours, theirs = self._superblock, other._superblock
        if _shape(ours) != _shape(theirs):
            return None
        return [InodeRange(self._number(min(ours.groups, theirs.groups), 0), END_OF_INODES)]

    def inodes_in(self, changed: Iterable[ByteRange]) -> Iterator[InodeRange]:
        """Inodes of which at least one byte lies in one of *changed*."""
        group_size = self._superblock.group_blocks << self._superblock.block_log
        size_log = self._superblock.inode_log
        for begin, end in changed:
            for group in range(begin // group_size, -(-end // group_size)):
                start = group * group_size
                first = max(begin - start, 0) >> size_log
                last = -(-min(end - start, group_size) >> size_log)
                yield InodeRange(self._number(group, first), self._number(group, last))

    def _number(self, group: int, inode: int) -> int:
        sb = self._superblock
        return (group << (sb.group_blocks_log + sb.inodes_per_block_log)) + inode


def _shape(superblock: _Superblock) -> _Superblock:
    """What has to be equal: features come with their first use, groups when it grows."""
    return superblock._replace(groups=0, version=superblock.version & _VERSION_MASK)


def read_xfs(device: BinaryIO) -> XfsInodes | None:
    """The places on *device*; None where something is not known to this module."""
    device.seek(0)
    raw = device.read(_LENGTH)
    if len(raw) < _LENGTH:
        return None
    superblock = _Superblock._make(_SUPERBLOCK.unpack_from(raw))
    if not superblock.makes_sense():
        return None
    if superblock.version & _VERSION_MASK == _VERSIONS[-1]:
        (incompat,) = _U32.unpack_from(raw, _INCOMPAT_OFFSET)
        if incompat & ~_INCOMPAT_KNOWN:
            return None
    return XfsInodes(superblock)
