"""One thin device on one unix socket, for clients that speak NBD: QEMU, qemu-img, nbd-client.

The socket comes from outside, bound and listening: the file system that its name lies on may stand
on a device of this very process.  Whoever can connect has the disk, as with a device node; its mode
is the protection.
"""

import logging
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.engine.embedded.nbd_disk import NbdDisk
from devmapper.engine.embedded.nbd_handshake import BrokenProtocol, Gone, agree
from devmapper.engine.embedded.nbd_transmission import Transmission
from devmapper.engine.embedded.target import MappedTarget
from devmapper.engine.port import NbdExport

log = logging.getLogger(__name__)

_MAX_CONNECTIONS: Final = 16  # QEMU opens one, clients that use several open up to eight
_MAX_LOANS: Final = 4  # requests of up to 32 MiB at once
_ACCEPT_PAUSE_SECONDS: Final = 0.1
_END_SECONDS: Final = 5.0
_UCRED: Final = struct.Struct("=3i")


class NbdService:
    """Serves *target* to all who connect to *listener*, from threads of its own.

    A client counts when its handshake has ended, until all that it asked for has been done.
    """

    def __init__(
        self,
        name: str,
        target: MappedTarget,
        listener: socket.socket,
        path: Path,
        *,
        read_only: bool,
    ) -> None:
        self.path = path
        self._name = name
        self._disk = NbdDisk(name, target, read_only=read_only)
        self._listener = listener
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # whenever a connection has
        self._connections: dict[socket.socket, str] = {}  # who it is, in words
        self._clients: set[socket.socket] = set()
        self._late: set[socket.socket] = set()  # clients that were waited for in vain
        self._admits = True
        self._closed = False
        self._loans = threading.Semaphore(_MAX_LOANS)
        self._threads: set[threading.Thread] = set()

    def start(self) -> None:
        """Answer from now on."""
        thread = threading.Thread(target=self._accept_all, name="nbd-accept", daemon=True)
        thread.start()

    def status(self) -> NbdExport:
        with self._lock:
            clients = tuple(sorted(self._connections[each] for each in self._clients))
        return NbdExport(self.path, self._disk.read_only, clients)

    def settle(self, seconds: float) -> None:
        """Wait for the end of clients that have closed their sockets, at most *seconds*.

        A close(2) of a device is over when it returns, that of a socket is not: whoever has just
        seen QEMU exit would be told that it holds the disk.  What such a client has asked for is
        done first; if that has to wait, for space in a full pool say, it stays counted, and nobody
        waits for it again.
        """
        with self._ended:
            self._ended.wait_for(lambda: not self._leaving(), seconds)
            self._late |= self._leaving()

    def _leaving(self) -> set[socket.socket]:
        return {each for each in self._clients - self._late if _has_gone(each)}

    def admit(self, *, new: bool) -> None:
        """Whether *new* clients are taken from now on; those that are there stay."""
        with self._lock:
            self._admits = new

    def close_if_idle(self) -> bool:
        """End it, unless it has a client; whether it has ended."""
        with self._lock:
            if self._clients:
                return False
            self._closed = True
        self._hang_up()
        return True

    def close(self) -> None:
        """End it, whoever uses it.  What clients asked for before may still be under way."""
        with self._lock:
            self._closed = True
        self._hang_up()
        deadline = time.monotonic() + _END_SECONDS
        for thread in tuple(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _hang_up(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which close does not
        self._listener.close()
        with self._lock:
            connections = tuple(self._connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept_all(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as err:
                if self._closed:
                    return
                log.warning("%s: cannot accept an NBD client: %s", self._name, err)
                time.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            if not self._take(connection):
                connection.close()

    def _take(self, connection: socket.socket) -> bool:
        """Start to serve a connection; False if it is one too many."""
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="nbd-client", daemon=True
        )
        with self._lock:
            if self._closed or len(self._connections) >= _MAX_CONNECTIONS:
                return False
            self._connections[connection] = _who(connection)
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as err:  # no more threads
            log.warning("%s: cannot serve an NBD client: %s", self._name, err)
            self._forget(connection, thread)
            return False
        return True

    def _serve(self, connection: socket.socket) -> None:
        who = self._connections[connection]
        try:
            agreed = agree(connection, self._disk.offer(), admit=lambda: self._count_in(connection))
            log.info("%s is a client of %s", who, self._name)
            Transmission(connection, self._disk, self._loans, agreed).run()
        except (Gone, OSError) as err:
            log.debug("%s: %s has gone: %r", self._name, who, err)
        except BrokenProtocol as err:
            log.warning("%s: %s does not speak NBD: %s", self._name, who, err)
        except Exception:
            log.exception("%s: defect while serving %s", self._name, who)
        finally:
            self._forget(connection, threading.current_thread())
            connection.close()

    def _count_in(self, connection: socket.socket) -> bool:
        with self._lock:
            if self._closed or not self._admits:
                return False
            self._clients.add(connection)
            return True

    def _forget(self, connection: socket.socket, thread: threading.Thread) -> None:
        with self._lock:
            self._clients.discard(connection)
            self._late.discard(connection)
            self._connections.pop(connection, None)
            self._threads.discard(thread)
            self._ended.notify_all()


def _has_gone(connection: socket.socket) -> bool:
    """Whether the other end is closed, with all its copies; data that it sent may be left."""
    poll = select.poll()
    poll.register(connection, 0)  # POLLHUP is always told
    return bool(poll.poll(0))


def _who(connection: socket.socket) -> str:
    """The process at the other end, in words; it may have handed the socket on."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, _, _ = _UCRED.unpack(raw)
    try:
        command = Path("/proc", str(pid), "comm").read_text(errors="replace").strip()
    except OSError:
        return "an NBD client" if pid <= 0 else f"process {pid} over NBD"
    return f"process {pid} ({command}) over NBD"
