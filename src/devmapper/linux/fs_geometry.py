"""How large the file system on a device is, and how large it can be there: its superblock says.

Reads one block and mounts nothing.  Of a file system that was not unmounted the superblock may be
older than its journal: it may have grown already.
"""

import errno
import mmap
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from devmapper.linux.blockdev import probe_fs_type
from devmapper.units import Bytes

# struct ext4_super_block, 1024 bytes into the device: s_blocks_count_lo; s_first_data_block,
# s_log_block_size; s_blocks_per_group; s_inodes_per_group; s_inode_size; s_feature_incompat;
# s_reserved_gdt_blocks; s_blocks_count_hi
_EXT4_OFFSET: Final = 1024
_EXT4: Final = Struct("<4xI12xII4xI4xI44xHH4xI106xH128xI")
_EXT4_FEATURE_64BIT: Final = 0x80
_EXT4_SPARE_BLOCKS: Final = 50  # what resize2fs wants to be left for files in a last group

# struct xfs_dsb: sb_blocksize, sb_dblocks; sb_agblocks; sb_imax_pct
_XFS: Final = Struct(">4xIQ68xI39xB")
_XFS_MIN_AG_BLOCKS: Final = 64  # fs/xfs/libxfs/xfs_shared.h


class Geometry(NamedTuple):
    """Sizes in blocks of the file system, but for *block_size*, which is in bytes."""

    fs_type: str
    block_size: Bytes
    blocks: int
    first_block: int  # where the first group begins
    group_blocks: int  # of an ext4 block group or an xfs allocation group
    least_group: int  # a last group that is smaller than this is left out
    max_inode_percent: int = 0  # xfs only

    @property
    def size(self) -> Bytes:
        return Bytes(self.blocks * self.block_size)

    def blocks_on(self, device_size: int) -> int:
        """How many blocks the file system has when it fills a device of that size.

        Never less than now.  A remainder that is too small for a group of its own stays unused,
        so that a file system which leaves it out counts as grown.
        """
        wanted = device_size // self.block_size
        if self.fs_type == "ext4":
            # mke2fs and resize2fs take whole pages only, because the page cache does
            wanted -= wanted % max(1, mmap.PAGESIZE // self.block_size)
        rest = (wanted - self.first_block) % self.group_blocks
        if 0 < rest < self.least_group and wanted - rest >= self.blocks:
            wanted -= rest
        return max(wanted, self.blocks)

    def fills(self, device_size: int) -> bool:
        """Whether a device of that size has no room for the file system to grow."""
        return self.blocks_on(device_size) == self.blocks


def geometry(device: Path) -> Geometry:
    """Read it from *device*; EINVAL for a kind of file system that we do not make."""
    fs_type = probe_fs_type(device)
    with open(device, "rb", buffering=0) as file:
        if fs_type == "ext4":
            file.seek(_EXT4_OFFSET)
            found = _ext4(file.read(_EXT4.size))
        elif fs_type == "xfs":
            found = _xfs(file.read(_XFS.size))
        else:
            raise OSError(errno.EINVAL, f"size of {fs_type} is not known to us", str(device))
    if found.block_size <= 0 or found.group_blocks <= 0:
        raise OSError(errno.EINVAL, f"superblock of {fs_type} makes no sense", str(device))
    return found


def _ext4(raw: bytes) -> Geometry:
    (low, first, log_size, per_group, inodes, inode_size, _, incompat, reserved, high) = (
        _EXT4.unpack(raw)
    )
    block_size = 1024 << min(log_size, 16)
    blocks = low | (high << 32 if incompat & _EXT4_FEATURE_64BIT else 0)
    inode_blocks = -(-inodes * (inode_size or 128) // block_size)
    descriptor_blocks = -(-blocks * 64 // (max(per_group, 1) * block_size))
    least = 3 + inode_blocks + descriptor_blocks + reserved + _EXT4_SPARE_BLOCKS
    return Geometry("ext4", Bytes(block_size), blocks, first, per_group, least)


def _xfs(raw: bytes) -> Geometry:
    block_size, blocks, group_blocks, percent = _XFS.unpack(raw)
    return Geometry("xfs", Bytes(block_size), blocks, 0, group_blocks, _XFS_MIN_AG_BLOCKS, percent)
