"""The wire format of FUSE, as far as one directory of plain files needs it (linux/fuse.h, 7.31).

Layout only: no I/O, no policy.  Integers are of the machine's byte order; the structures are
packed as the kernel declares them, all of them multiples of eight bytes.
"""

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

KERNEL_VERSION: Final = 7
KERNEL_MINOR_VERSION: Final = 31
ROOT_ID: Final = 1
MIN_READ_BUFFER: Final = 8192  # FUSE_MIN_READ_BUFFER
DEV_IOC_CLONE: Final = 0x8004E500  # FUSE_DEV_IOC_CLONE


class Opcode(IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43


class InitFlag(IntFlag):
    """FUSE_INIT flags that we ask for."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22


class OpenFlag(IntFlag):
    """FOPEN_* in the reply to OPEN."""

    DIRECT_IO = 1 << 0
    PARALLEL_DIRECT_WRITES = 1 << 6


class FallocateMode(IntFlag):
    """linux/falloc.h, as FALLOCATE passes it on."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


SETATTR_SIZE: Final = 1 << 3  # FATTR_SIZE

# struct fuse_in_header: len opcode unique nodeid uid gid pid total_extlen padding
IN_HEADER: Final = Struct("=IIQQIIIHH")
# struct fuse_out_header: len error unique
OUT_HEADER: Final = Struct("=IiQ")

INIT_IN: Final = Struct("=IIII")  # major minor max_readahead flags
# major minor max_readahead flags max_background congestion_threshold max_write time_gran
# max_pages map_alignment flags2 unused[7]
INIT_OUT: Final = Struct("=IIIIHHIIHHI28x")
# ino size blocks atime mtime ctime, their nanoseconds, mode nlink uid gid rdev blksize flags
ATTR: Final = Struct("=6Q10I")
# nodeid generation entry_valid attr_valid and the nanoseconds of the last two; ATTR follows
ENTRY_OUT: Final = Struct("=4Q2I")
ATTR_OUT: Final = Struct("=QII")  # attr_valid attr_valid_nsec dummy; ATTR follows
SETATTR_IN: Final = Struct("=IIQQ")  # valid padding fh size, and more that we leave alone
OPEN_OUT: Final = Struct("=QII")  # fh open_flags backing_id
RW_IN: Final = Struct("=QQIIQII")  # fuse_read_in, fuse_write_in: fh offset size …
WRITE_REPLY: Final = Struct("=IiQII")  # OUT_HEADER and fuse_write_out: size padding
FALLOCATE_IN: Final = Struct("=QQQII")  # fh offset length mode padding
# blocks bfree bavail files ffree bsize namelen frsize padding spare[6]
STATFS_OUT: Final = Struct("=5Q4I24x")
READ_DIR_IN: Final = Struct("=QQI")  # fh offset size
DIRENT: Final = Struct("=QQII")  # ino off namelen type; the name follows, padded to 8 bytes

# What a READ or a WRITE begins with: opcode unique nodeid offset size
REQUEST: Final = Struct("=4xIQQ16x8xQI")
PREFIX_SIZE: Final = IN_HEADER.size + RW_IN.size  # the data of a WRITE start behind it


def dirent(ino: int, offset: int, name: bytes, kind: int) -> bytes:
    """One struct fuse_dirent; *offset* is that of the entry after it."""
    raw = DIRENT.pack(ino, offset, len(name), kind) + name
    return raw + bytes(-len(raw) % 8)
