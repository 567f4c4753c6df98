"""A client of NBD that says exactly what a test wants; it has the document's numbers for itself."""

import socket
import struct
from pathlib import Path
from typing import NamedTuple, Self

IHAVEOPT = 0x49484156454F5054
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY = 1, 2, 3, 5, 6, 7, 8
LIST_META_CONTEXT, SET_META_CONTEXT = 9, 10
ACK, SERVER, INFO_REPLY, META_CONTEXT = 1, 2, 3, 4
NO_CHUNK, OFFSET_DATA, STATUS_CHUNK, ERROR_CHUNK = 0, 1, 5, 0x8001
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_SHUTDOWN = ((1 << 31) + n for n in (1, 3, 6, 7))
INFO_EXPORT, INFO_NAME, INFO_BLOCK_SIZE = 0, 1, 3


class Answer(NamedTuple):
    """One reply to an option."""

    option: int
    kind: int
    data: bytes


class Ended(Exception):
    """The server has closed the connection."""


class NbdClient:
    """A raw connection; `go` makes it ready for requests."""

    def __init__(self, path: Path | str, *, flags: int = 3) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(60)
        self.size = self.flags = 0
        self._cookie = 1000
        try:
            self.socket.connect(str(path))
            magic, option_magic, self.handshake_flags = struct.unpack(">QQH", self.receive(18))
            assert (magic, option_magic) == (0x4E42444D41474943, IHAVEOPT)
            self.send(struct.pack(">I", flags))
        except BaseException:
            self.socket.close()
            raise

    @classmethod
    def ready(cls, path: Path | str) -> Self:
        self = cls(path)
        self.go()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                piece = self.socket.recv(length - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise Ended
            data += piece
        return data

    def has_ended(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    # Options

    def option(self, option: int, data: bytes = b"") -> None:
        self.send(struct.pack(">QII", IHAVEOPT, option, len(data)) + data)

    def answer(self) -> Answer:
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x3E889045565A9
        return Answer(option, kind, self.receive(length))

    def answers(self, option: int, data: bytes = b"") -> list[Answer]:
        """Ask, and take replies up to the last one."""
        self.option(option, data)
        found = [self.answer()]
        while found[-1].kind in (SERVER, INFO_REPLY, META_CONTEXT):
            found.append(self.answer())
        assert {each.option for each in found} == {option}
        return found

    def go(self, name: bytes = b"", *infos: int) -> dict[int, bytes]:
        """Enter transmission; returns what the server told, by kind of information."""
        *told, last = self.answers(GO, info_data(name, *infos))
        assert last.kind == ACK, last
        found = {int.from_bytes(each.data[:2]): each.data[2:] for each in told}
        self.size, self.flags = struct.unpack(">QH", found[INFO_EXPORT])
        return found

    # Requests

    def ask(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        *,
        flags: int = 0,
        magic: int = 0x25609513,
    ) -> int:
        """Send a request, and return its cookie."""
        self._cookie += 1
        head = struct.pack(">IHHQQI", magic, flags, command, self._cookie, offset, length)
        self.send(head + data)
        return self._cookie

    def reply(self) -> tuple[int, int]:
        """Error and cookie of the next reply; what a READ has got has to be received next."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return error, cookie

    def chunk(self) -> tuple[int, int, bytes]:
        """Kind, cookie and content of a structured reply of one chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert (magic, flags) == (0x668E33EF, 1)
        return kind, cookie, self.receive(length)

    def error_chunk(self) -> int:
        """The error that comes instead of what was asked for."""
        kind, _, content = self.chunk()
        assert kind == ERROR_CHUNK
        error, words = struct.unpack_from(">IH", content)
        assert len(content) == 6 + words
        return int(error)

    def extents(self, offset: int, length: int, *, flags: int = 0) -> list[tuple[int, int]]:
        """What `base:allocation` says: lengths and states."""
        cookie = self.ask(BLOCK_STATUS, offset, length, flags=flags)
        kind, answered, content = self.chunk()
        assert (kind, answered) == (STATUS_CHUNK, cookie)
        (context,) = struct.unpack_from(">I", content)
        assert context == 1
        return list(struct.iter_unpack(">II", content[4:]))

    def call(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        *,
        flags: int = 0,
    ) -> int:
        """A request that gets no data; returns its error."""
        cookie = self.ask(command, offset, length, data, flags=flags)
        error, answered = self.reply()
        assert answered == cookie
        return error

    def read(self, offset: int, length: int) -> bytes:
        assert self.call(READ, offset, length) == 0
        return self.receive(length)

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        assert self.call(WRITE, offset, len(data), data, flags=flags) == 0


def info_data(name: bytes, *infos: int) -> bytes:
    """The data of INFO and GO."""
    head = struct.pack(">I", len(name)) + name + struct.pack(">H", len(infos))
    return head + b"".join(struct.pack(">H", info) for info in infos)


def contexts_data(name: bytes, *queries: bytes) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    head = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return head + b"".join(struct.pack(">I", len(query)) + query for query in queries)
