"""The NBD protocol on the wire: names, numbers and layouts.  No I/O, no policy.

Names and numbers are those of the protocol's document (`doc/proto.md` of the project nbd); all
integers are big-endian.
"""

import errno
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

# Handshake: the server's greeting, the client's flags, then options and their replies

GREETING: Final = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, HandshakeFlag
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # IHAVEOPT, Option, length of the data
OPTION_REPLY: Final = Struct(">QIII")  # REPLY_MAGIC, Option, Reply, length of the data
EXPORT: Final = Struct(">QH")  # answer to EXPORT_NAME: size, TransmissionFlag
EXPORT_PADDING: Final = bytes(124)  # behind it, unless NO_ZEROES was agreed

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x0003E889045565A9

NAME_MAX: Final = 4096  # the longest name of an export, in bytes of UTF-8
LENGTH: Final = Struct(">I")  # before a name
INFO_TYPE: Final = Struct(">H")  # one thing that INFO and GO ask for; before it how many
INFO_EXPORT: Final = Struct(">HQH")  # Info.EXPORT, size, TransmissionFlag
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # Info.BLOCK_SIZE, smallest, preferred, largest
META_CONTEXT: Final = Struct(">I")  # the number of a context, before its name

ALLOCATION: Final = "base:allocation"  # the context that says what is mapped
ALLOCATION_ID: Final = 1


class HandshakeFlag(IntFlag):
    """What the server offers and the client takes; both sides use the same bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client asks for before it reads and writes."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """Kinds of replies to options; errors have the highest bit."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_INVALID = (1 << 31) + 3
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_TOO_BIG = (1 << 31) + 9


class Info(IntEnum):
    """What INFO and GO tell."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8


# Transmission: requests, simple replies, and structured ones for who has asked for them

REQUEST: Final = Struct(">IHHQQI")  # REQUEST_MAGIC, CommandFlag, Command, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">IIQ")  # SIMPLE_REPLY_MAGIC, error, cookie

REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
CHUNK: Final = Struct(">IHHQI")  # CHUNK_MAGIC, CHUNK_DONE, Chunk, cookie, length of what follows
CHUNK_DONE: Final = 1  # the last of a reply; ours have one
DATA_CHUNK: Final = Struct(">IHHQIQ")  # the same, and the offset before the data
DATA_OFFSET_SIZE: Final = DATA_CHUNK.size - CHUNK.size
CHUNK_ERROR: Final = Struct(">IH")  # error, length of a message
EXTENT: Final = Struct(">II")  # length, Allocation

MAX_PAYLOAD: Final = 32 * 1024 * 1024  # what a client may send that was told no other limit


class Command(IntEnum):
    """What a client does with an export."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Chunk(IntEnum):
    """Kinds of structured replies."""

    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1


class Allocation(IntFlag):
    """What `base:allocation` says of an extent; 0 is data."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class CommandFlag(IntFlag):
    """How it does it."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3


# FUA says nothing with a READ or a FLUSH, but the document lets it stand with every command.
# Plain integers: the complement of an IntFlag has no unknown bits
FLAGS_OF: Final[dict[int, int]] = {
    **dict.fromkeys(Command, int(CommandFlag.FUA)),
    Command.READ: int(CommandFlag.FUA | CommandFlag.DF),  # ours are never fragmented
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE),
    Command.BLOCK_STATUS: int(CommandFlag.FUA | CommandFlag.REQ_ONE),
}

# The errors that there are, as numbers of the protocol, by what Linux calls them
_ERRORS: Final = {
    errno.EPERM: 1,
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
}


def error_number(number: int | None) -> int:
    """The protocol's number for an errno; what it has no number for is EIO."""
    return _ERRORS.get(number or errno.EIO, 5)
