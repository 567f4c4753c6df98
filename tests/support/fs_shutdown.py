"""A file system that ends at once, as at a loss of power or an error that it cannot live with."""

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

# _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN (fs/ext4/ext4.h), XFS_IOC_GOINGDOWN (xfs_fs.h)
_SHUTDOWN: Final = 0x8004587D
_LOG_FLUSHED: Final = 1
_LOG_NOT_FLUSHED: Final = 2


def shut_down(root: Path | str, *, has_log: bool) -> None:
    """End the ext4 or xfs mounted at *root*: it stays mounted, and gives errors.

    Its device has what was written back so far, and, if *has_log*, all else in the journal, which
    the next mount replays.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flags = _LOG_FLUSHED if has_log else _LOG_NOT_FLUSHED
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", flags))
    finally:
        os.close(fd)
