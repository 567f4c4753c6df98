"""Tars between command and daemon: frames, so that an error amid a tar arrives as an error.

    u8   kind: 0 arguments, 1 data, 2 end, 3 error
    u32  number of bytes that follow, big-endian
         JSON, or a piece of the tar

A transfer is whole when its end has come; one that just stops was broken off.
"""

import io
import json
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from devmapper.graph import failures

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE: Final = 256 * 1024  # of a tar in one frame
LIMIT: Final = 1 << 20
_HEADER: Final = Struct(">BI")


class Kind(IntEnum):
    ARGUMENTS = 0
    DATA = 1
    END = 2
    ERROR = 3


class Frame(NamedTuple):
    kind: Kind
    body: bytes


class BrokenFrames(ConnectionError):
    """The other side has sent something else, or less."""


def pack(kind: Kind, body: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(body)) + body


def pack_json(kind: Kind, value: object) -> bytes:
    return pack(kind, json.dumps(value).encode())


def read_frame(stream: BinaryIO) -> Frame:
    """The next frame; `BrokenFrames` for what is none, and at the end."""
    number, size = _HEADER.unpack(_exactly(stream, _HEADER.size))
    if number not in set(Kind) or size > LIMIT:
        raise BrokenFrames(f"a frame of kind {number} and {size} bytes")
    return Frame(Kind(number), _exactly(stream, size))


class FramedTar(io.RawIOBase):
    """The tar inside of frames, to be read by whoever wants it.

    With *keep* an error that the other side reports is kept in `error` and ends the tar; it is
    raised where it is read otherwise.
    """

    def __init__(self, stream: BinaryIO, *, keep: bool = False) -> None:
        super().__init__()
        self._stream = stream
        self._keep = keep
        self._rest = memoryview(b"")
        self._ended = False
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        while not self._rest and not self._ended:
            self._next()
        target = memoryview(buffer)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _next(self) -> None:
        kind, body = read_frame(self._stream)
        match kind:
            case Kind.DATA:
                self._rest = memoryview(body)
            case Kind.END:
                self._ended = True
            case Kind.ERROR:
                self._ended = True
                self.error = failures.from_json(failures.loads(body))
                if not self._keep:
                    raise self.error
            case Kind.ARGUMENTS:
                raise BrokenFrames("arguments amid a tar")


def _exactly(stream: BinaryIO, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = stream.read(size - len(found))
        if not piece:
            raise BrokenFrames("the transfer was broken off")
        found += piece
    return found
