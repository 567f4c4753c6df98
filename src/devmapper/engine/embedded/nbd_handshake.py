"""The first half of an NBD connection: the fixed newstyle handshake.

The client is a stranger: everything is bounded, in bytes and in time.  What breaks the protocol
raises `BrokenProtocol`; what the protocol has an error for is answered with that error.
"""

import socket
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from devmapper.engine.embedded import nbd_format as nbd
from devmapper.engine.embedded.nbd_format import (
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)

_OFFERED: Final = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_MAX_OPTION: Final = 64 * 1024  # bytes of one option's data; a name and all infos take less
_SECONDS: Final = 30.0


class BrokenProtocol(Exception):
    """The client sent what no client sends; the connection has to end."""


class Gone(Exception):
    """The client has closed the connection, or asked for its end."""


class Agreement(NamedTuple):
    """What a client has asked for beyond reading and writing."""

    structured: bool = False
    allocation: bool = False  # it may ask which blocks are mapped


class Offer(NamedTuple):
    """The one export that there is, as the handshake tells of it."""

    name: str  # "" names it as well
    size: int  # bytes
    flags: int  # TransmissionFlag
    minimum: int  # block sizes in bytes
    preferred: int
    maximum: int


def agree(
    connection: socket.socket, offer: Offer, *, admit: Callable[[], bool], seconds: float = _SECONDS
) -> Agreement:
    """Hold the handshake; when it returns the client may read and write.

    *admit* is asked last, and counts the client in; False is an answer of its own (the device is
    going away).  `Gone`, `BrokenProtocol` or `OSError` where it comes to no end; `TimeoutError` is
    one of the last: all of it may take *seconds*.
    """
    try:
        return _Handshake(connection, offer, admit, time.monotonic() + seconds).run()
    finally:
        connection.settimeout(None)


class _Handshake:
    def __init__(
        self, connection: socket.socket, offer: Offer, admit: Callable[[], bool], ends: float
    ) -> None:
        self._connection = connection
        self._offer = offer
        self._admit = admit
        self._no_zeroes = False
        self._structured = False
        self._allocation_of: bytes | None = None  # the name for which it was asked
        self._entered = b""
        self._ends = ends

    def run(self) -> Agreement:
        self._send(nbd.GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, _OFFERED))
        (flags,) = nbd.CLIENT_FLAGS.unpack(self._receive(nbd.CLIENT_FLAGS.size))
        if flags & ~_OFFERED:
            raise BrokenProtocol(f"client flags {flags:#x}")
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        while not self._answer(*self._option()):
            pass
        # The selection is of one name: whoever then enters by another has none
        return Agreement(self._structured, self._allocation_of == self._entered)

    def _option(self) -> tuple[int, bytes]:
        magic, option, length = nbd.OPTION.unpack(self._receive(nbd.OPTION.size))
        if magic != nbd.IHAVEOPT:
            raise BrokenProtocol(f"magic {magic:#x} before an option")
        if length > _MAX_OPTION:
            raise BrokenProtocol(f"option {option} with {length} bytes of data")
        return option, self._receive(length)

    def _answer(self, option: int, data: bytes) -> bool:
        """Answer one option; whether it was the last."""
        match option:
            case Option.EXPORT_NAME:
                self._export_name(data)
                return True
            case Option.ABORT:
                self._reply(option, Reply.ACK)
                raise Gone
            case Option.LIST:
                self._list(data)
            case Option.INFO | Option.GO:
                return self._info(option, data)
            case Option.STRUCTURED_REPLY:
                self._structured |= not data
                self._reply(option, Reply.ERR_INVALID if data else Reply.ACK)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                self._contexts(option, data)
            case _:
                self._reply(option, Reply.ERR_UNSUP)
        return False

    def _export_name(self, data: bytes) -> None:
        """The old way: there is no error but the end of the connection."""
        if not self._is_known(data):
            raise BrokenProtocol(f"no export {data[:64]!r}")
        if not self._admit():
            raise Gone
        self._entered = data
        answer = nbd.EXPORT.pack(self._offer.size, self._flags())
        self._send(answer if self._no_zeroes else answer + nbd.EXPORT_PADDING)

    def _list(self, data: bytes) -> None:
        if data:
            self._reply(Option.LIST, Reply.ERR_INVALID)
            return
        name = self._offer.name.encode()
        self._reply(Option.LIST, Reply.SERVER, nbd.LENGTH.pack(len(name)) + name)
        self._reply(Option.LIST, Reply.ACK)

    def _info(self, option: int, data: bytes) -> bool:
        asked = _parse_info(data)
        if asked is None:
            self._reply(option, Reply.ERR_INVALID)
            return False
        name, wanted = asked
        if not self._is_known(name):
            self._reply(option, Reply.ERR_UNKNOWN)
            return False
        if option == Option.GO and not self._admit():
            self._reply(option, Reply.ERR_SHUTDOWN)
            return False
        self._entered = name
        offer = self._offer
        export = nbd.INFO_EXPORT.pack(Info.EXPORT, offer.size, self._flags())
        self._reply(option, Reply.INFO, export)
        if Info.NAME in wanted:
            self._reply(option, Reply.INFO, nbd.INFO_TYPE.pack(Info.NAME) + offer.name.encode())
        if Info.BLOCK_SIZE in wanted:
            sizes = (offer.minimum, offer.preferred, offer.maximum)
            self._reply(option, Reply.INFO, nbd.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        self._reply(option, Reply.ACK)
        return option == Option.GO

    def _contexts(self, option: int, data: bytes) -> None:
        """Which contexts there are (LIST), which the client wants to ask about (SET)."""
        asked = _parse_contexts(data)
        if asked is None or not self._structured:
            self._reply(option, Reply.ERR_INVALID)
            return
        name, queries = asked
        if not self._is_known(name):
            self._reply(option, Reply.ERR_UNKNOWN)
            return
        chosen = nbd.ALLOCATION.encode() in queries
        if option == Option.SET_META_CONTEXT:
            self._allocation_of = name if chosen else None
        elif not queries or b"base:" in queries:
            chosen = True
        if chosen:
            head = nbd.META_CONTEXT.pack(nbd.ALLOCATION_ID)
            self._reply(option, Reply.META_CONTEXT, head + nbd.ALLOCATION.encode())
        self._reply(option, Reply.ACK)

    def _flags(self) -> int:
        return self._offer.flags | (TransmissionFlag.SEND_DF if self._structured else 0)

    def _is_known(self, name: bytes) -> bool:
        return name in (b"", self._offer.name.encode())

    def _reply(self, option: int, kind: Reply, data: bytes = b"") -> None:
        self._send(nbd.OPTION_REPLY.pack(nbd.REPLY_MAGIC, option, kind, len(data)) + data)

    def _send(self, data: bytes) -> None:
        self._hurry()
        self._connection.sendall(data)

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._hurry()
            piece = self._connection.recv(length - len(data))
            if not piece:
                raise Gone
            data += piece
        return bytes(data)

    def _hurry(self) -> None:
        """One byte a minute would keep a thread for ever: the time is for all of it."""
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)


def _parse_info(data: bytes) -> tuple[bytes, set[int]] | None:
    """The name and the infos that INFO and GO ask for; None if the data are not what they say."""
    size = nbd.LENGTH.size
    if len(data) < size:
        return None
    (length,) = nbd.LENGTH.unpack_from(data)
    behind = size + length
    if length > nbd.NAME_MAX or len(data) < behind + nbd.INFO_TYPE.size:
        return None
    (count,) = nbd.INFO_TYPE.unpack_from(data, behind)
    infos = data[behind + nbd.INFO_TYPE.size :]
    if len(infos) != count * nbd.INFO_TYPE.size:
        return None
    return data[size:behind], {wanted for (wanted,) in nbd.INFO_TYPE.iter_unpack(infos)}


def _parse_contexts(data: bytes) -> tuple[bytes, list[bytes]] | None:
    """The name of the export and the queries; None if the data are not what they say."""
    strings: list[bytes] = []
    count, at, size = 1, 0, nbd.LENGTH.size
    while len(strings) < count:
        if len(data) < at + size:
            return None
        (length,) = nbd.LENGTH.unpack_from(data, at)
        at += size
        if length > min(nbd.NAME_MAX, len(data) - at):
            return None
        strings.append(data[at : at + length])
        at += length
        if len(strings) == 1:  # behind the name: how many queries
            if len(data) < at + size:
                return None
            count += nbd.LENGTH.unpack_from(data, at)[0]
            at += size
    return (strings[0], strings[1:]) if at == len(data) else None
