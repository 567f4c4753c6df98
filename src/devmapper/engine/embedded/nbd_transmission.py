"""The second half of an NBD connection: requests and their replies, several at a time.

One worker reads a request, with the data of a WRITE, and lets the next one read while it works, so
that a flush or a write that waits for space keeps nobody: replies come in any order, as the
protocol has it.  The first worker is the caller's thread; more are started when all are busy.
"""

import errno
import mmap
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import Final, NamedTuple

from devmapper.engine.embedded import nbd_format as nbd
from devmapper.engine.embedded.nbd_disk import NbdDisk
from devmapper.engine.embedded.nbd_format import Chunk, Command, CommandFlag
from devmapper.engine.embedded.nbd_handshake import Agreement, BrokenProtocol, Gone

_WORKERS: Final = 8
_BUFFER: Final = 1024 * 1024  # of a worker; a longer request borrows memory for its time
_NO_DATA: Final = memoryview(b"")
_MOVES_DATA: Final = frozenset({int(Command.READ), int(Command.WRITE)})
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)


class _Request(NamedTuple):
    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    refusal: int  # errno, 0 = to be done
    view: memoryview


class Transmission:
    """One client after its handshake.  *loans* is held for each request longer than a buffer."""

    def __init__(
        self,
        connection: socket.socket,
        disk: NbdDisk,
        loans: threading.Semaphore,
        agreed: Agreement,
    ) -> None:
        self._agreed = agreed
        self._connection = connection
        self._disk = disk
        self._loans = loans
        self._receiving = threading.Lock()
        self._sending = threading.Lock()
        self._ended = False
        self._waiting: deque[None] = deque()  # workers that want to receive; counted atomically
        self._helpers: list[threading.Thread] = []
        self._failure: BrokenProtocol | None = None

    def run(self) -> None:
        """Serve until the client leaves; nothing of it is under way any more then.

        `BrokenProtocol` if it was put out.  Whoever wants to end it shuts the socket down.
        """
        try:
            self._work()
        finally:
            for helper in self._helpers:  # after the end none is started
                helper.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        buffer = memoryview(mmap.mmap(-1, _BUFFER))
        header = bytearray(nbd.REQUEST.size)
        while (request := self._next(header, buffer)) is not None:
            flags, command, cookie, offset, length, refusal, view = request
            if command == Command.BLOCK_STATUS:
                self._tell_status(request)
                continue
            number = refusal or self._disk.perform(command, flags, offset, length, view)
            if command != _READ:
                self._send(_simple(cookie, number))
            elif not self._agreed.structured:
                self._send(_simple(cookie, number), _NO_DATA if number else view)
            elif number or not view:
                self._send(_ending(cookie, number))
            else:
                self._send(_data_chunk(cookie, offset, length), view)
            if len(view) > _BUFFER:
                self._loans.release()

    def _next(self, header: bytearray, buffer: memoryview) -> _Request | None:
        """Receive one request; None when there is no more."""
        self._waiting.append(None)
        with self._receiving:
            self._waiting.pop()
            if self._ended:
                return None
            try:
                request = self._receive(header, buffer)
            except (Gone, OSError, MemoryError):
                self._ended = True
                return None
            except BrokenProtocol as err:
                self._ended = True
                self._failure = err
                return None
            if not self._waiting and len(self._helpers) < _WORKERS - 1:
                self._add_helper()
            return request

    def _receive(self, header: bytearray, buffer: memoryview) -> _Request:
        self._fill(memoryview(header))
        magic, flags, command, cookie, offset, length = nbd.REQUEST.unpack(header)
        if magic != nbd.REQUEST_MAGIC:
            raise BrokenProtocol(f"magic {magic:#x} before a request")
        if command == Command.DISC:
            raise Gone
        refusal = self._disk.refusal(command, flags, offset, length)
        if flags & CommandFlag.DF and not self._agreed.structured:
            refusal = errno.EINVAL
        if command not in _MOVES_DATA or (command == _READ and refusal):
            return _Request(flags, command, cookie, offset, length, refusal, _NO_DATA)
        if length > nbd.MAX_PAYLOAD:
            if command == _WRITE:  # what follows is not worth reading, nor can it be skipped
                raise BrokenProtocol(f"a write of {length} bytes")
            return _Request(flags, command, cookie, offset, length, errno.EINVAL, _NO_DATA)
        view = buffer[:length] if length <= _BUFFER else self._borrow(length)
        if command == _WRITE:
            try:
                self._fill(view)
            except BaseException:
                if length > _BUFFER:
                    self._loans.release()
                raise
        return _Request(flags, command, cookie, offset, length, refusal, view)

    def _borrow(self, length: int) -> memoryview:
        """Memory for a long request; `release` of the loans gives it back."""
        self._loans.acquire()
        try:
            return memoryview(bytearray(length))
        except BaseException:
            self._loans.release()
            raise

    def _fill(self, view: memoryview) -> None:
        while view:
            received = self._connection.recv_into(view, 0, socket.MSG_WAITALL)
            if not received:
                raise Gone
            view = view[received:]

    def _tell_status(self, request: _Request) -> None:
        refusal = request.refusal
        if not self._agreed.allocation or not request.length:
            refusal = errno.EINVAL
        extents = b""
        if not refusal:
            refusal, extents = self._disk.block_status(
                request.flags, request.offset, request.length
            )
        if refusal and not self._agreed.structured:
            self._send(_simple(request.cookie, refusal))
        elif refusal:
            self._send(_ending(request.cookie, refusal))
        else:
            body = nbd.META_CONTEXT.pack(nbd.ALLOCATION_ID) + extents
            self._send(_chunk(Chunk.BLOCK_STATUS, request.cookie, body))

    def _send(self, head: bytes, data: memoryview = _NO_DATA) -> None:
        try:
            with self._sending:
                if not data:
                    self._connection.sendall(head)
                    return
                sent = self._connection.sendmsg((head, data))
                if sent < len(head):
                    self._connection.sendall(head[sent:])
                    sent = len(head)
                if sent < len(head) + len(data):
                    self._connection.sendall(data[sent - len(head) :])
        except OSError:
            # The client has gone amid a request; who receives has to see that, too
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def _add_helper(self) -> None:
        helper = threading.Thread(target=self._work, name="nbd-worker", daemon=True)
        try:
            helper.start()
        except RuntimeError:  # no more threads for this process: those that there are serve on
            return
        self._helpers.append(helper)


def _simple(cookie: int, number: int) -> bytes:
    """The reply that says no more than how it went; data of a READ follow."""
    error = nbd.error_number(number) if number else 0
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)


def _data_chunk(cookie: int, offset: int, length: int) -> bytes:
    """What stands before the data of a structured READ: one chunk, which is the last."""
    follows = nbd.DATA_OFFSET_SIZE + length
    return nbd.DATA_CHUNK.pack(
        nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, Chunk.OFFSET_DATA, cookie, follows, offset
    )


def _ending(cookie: int, number: int) -> bytes:
    """A structured reply without data: an error, or nothing at all."""
    if not number:
        return _chunk(Chunk.NONE, cookie)
    return _chunk(Chunk.ERROR, cookie, nbd.CHUNK_ERROR.pack(nbd.error_number(number), 0))


def _chunk(kind: Chunk, cookie: int, body: bytes = b"") -> bytes:
    return nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, kind, cookie, len(body)) + body
