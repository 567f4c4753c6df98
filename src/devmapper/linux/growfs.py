"""Letting a file system take the room that its device has gained: ext4 and xfs.

Both grow while they are mounted, by an ioctl on any of their directories; resize2fs and xfs_growfs
do the same.  The mount for it is nobody else's (`detached.py`).  Growing again what has grown does
nothing, so that an interrupted growth is completed by calling again.
"""

import logging
import os
import stat
from fcntl import ioctl
from pathlib import Path
from struct import Struct
from typing import Final

from devmapper.linux import blockdev
from devmapper.linux.detached import mounted_detached
from devmapper.linux.fs_geometry import Geometry, geometry

log = logging.getLogger(__name__)

_EXT4_IOC_RESIZE_FS: Final = 0x40086610  # include/uapi/linux/ext4.h
_EXT4_BLOCKS: Final = Struct("=Q")
_XFS_IOC_FSGROWFSDATA: Final = 0x4010586E  # fs/xfs/libxfs/xfs_fs.h
_XFS_GROWTH: Final = Struct("=QI4x")  # struct xfs_growfs_data: newblocks, imaxpct
_E2FSCK_OK: Final = (0, 1, 2)  # nothing found, or all of it repaired


def grow(device: Path) -> bool:
    """Let the file system on *device*, which is not mounted, fill it; False if it does already.

    Durable when it returns.  `OSError` of the mount or the ioctl; `ToolError` of e2fsck or
    resize2fs, which are run where this process may not resize a mounted ext4 (CAP_SYS_RESOURCE,
    which containers mostly lack).
    """
    before = geometry(device)
    if before.fills(blockdev.size(device)):
        return False
    if before.fs_type == "xfs":
        _grow_mounted(device, before)
    else:
        _grow_ext4(device, before)
    blockdev.flush(device)
    log.info("file system on %s has grown from %d bytes", device, before.size)
    return True


def _grow_ext4(device: Path, before: Geometry) -> None:
    if stat.S_ISBLK(device.stat().st_mode):  # a plain file cannot be mounted
        try:
            _grow_mounted(device, before)
        except PermissionError as err:
            log.debug("%s: growing it unmounted instead: %s", device, err.strerror)
        else:
            return
    from devmapper.linux import process

    # resize2fs refuses a file system that was in use since the last check
    process.run(["e2fsck", "-f", "-p", str(device)], ok=_E2FSCK_OK)
    process.run(["resize2fs", str(device)])


def _grow_mounted(device: Path, before: Geometry) -> None:
    blocks = before.blocks_on(blockdev.size(device))
    is_xfs = before.fs_type == "xfs"
    # A snapshot has its origin's UUID, which xfs refuses to mount twice
    with mounted_detached(device, before.fs_type, flags=["nouuid"] if is_xfs else []) as root:
        request = _XFS_IOC_FSGROWFSDATA if is_xfs else _EXT4_IOC_RESIZE_FS
        argument = (
            _XFS_GROWTH.pack(blocks, before.max_inode_percent)
            if is_xfs
            else _EXT4_BLOCKS.pack(blocks)
        )
        try:
            ioctl(root, request, argument)
            os.fsync(root)
        except OSError as err:
            message = f"growing {before.fs_type} to {blocks} blocks: {err.strerror}"
            raise OSError(err.errno, message, str(device)) from err
