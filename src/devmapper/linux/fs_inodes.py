"""How many inodes of a file system are in use.

Of one that is mounted the mount is asked, of another one the superblock, which is right since it
was unmounted.
"""

import errno
import os
from pathlib import Path
from struct import Struct
from typing import Final

from devmapper.linux.blockdev import opened, probe_fs_type

_EXT4_OFFSET: Final = 1024
_EXT4: Final = Struct("<I12xI")  # struct ext4_super_block: s_inodes_count, s_free_inodes_count
_XFS_OFFSET: Final = 128
_XFS: Final = Struct(">QQ")  # struct xfs_dsb: sb_icount, sb_ifree
_SUPERBLOCK: Final = 4096


def inodes_on(device: Path) -> int:
    """Inodes in use of the ext4 or xfs on *device*, which is not mounted; EINVAL for others."""
    fs_type = probe_fs_type(device)
    with opened(device, os.O_RDONLY) as fd:
        # xfs writes past the pages that the kernel may still have of the device
        os.posix_fadvise(fd, 0, _SUPERBLOCK, os.POSIX_FADV_DONTNEED)
        raw = os.pread(fd, _SUPERBLOCK, 0)
    if fs_type == "ext4":
        total, free = _EXT4.unpack_from(raw, _EXT4_OFFSET)
    elif fs_type == "xfs":
        total, free = _XFS.unpack_from(raw, _XFS_OFFSET)
    else:
        raise OSError(errno.EINVAL, f"inodes of {fs_type} are not known to us", str(device))
    return max(0, int(total) - int(free))


def inodes_below(mount_point: Path) -> int:
    """Inodes in use of the file system that is mounted on *mount_point*."""
    found = os.statvfs(mount_point)
    return max(0, found.f_files - found.f_ffree)
