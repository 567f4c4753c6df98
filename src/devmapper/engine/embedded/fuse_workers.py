"""The threads that read requests from /dev/fuse, move the data and answer.

Two workers are always there: CPython runs one of them at a time, the other one is meanwhile in the
kernel, copying.  More of them only fight for the interpreter, so others come when requests wait
and no worker gets on (a blocked target), or when they wait though the processor does not (a slow
disk), and go when they find nothing to do.

The hot path costs one readv, the target's call and one write; buffers and views are reused.
"""

import errno
import logging
import mmap
import os
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from devmapper.engine.embedded.exported_file import ExportedFile, Request
from devmapper.linux import libc
from devmapper.linux.fuse import (
    FALLOCATE_IN,
    IN_HEADER,
    OUT_HEADER,
    PREFIX_SIZE,
    REQUEST,
    WRITE_REPLY,
    Opcode,
)
from devmapper.units import SECTOR_SIZE

log = logging.getLogger(__name__)

MAX_IO: Final = 1024 * 1024  # bytes of one request: 256 pages, the most that FUSE does
_BASE_WORKERS: Final = 2
_DISK_WORKERS: Final = 16  # for more parallel I/O, while the processor is idle
_MAX_WORKERS: Final = 128
_STALLED_WORKERS: Final = 4  # that one blocked file may hold
_SAMPLE_SECONDS: Final = 0.01
_IDLE_SAMPLES: Final = 10
_CPU_BOUND: Final = 0.7  # of one processor: the interpreter is what limits us
_SURPLUS_REQUESTS: Final = 50  # in a row, before an extra worker ends
_END_SECONDS: Final = 5.0
# A worker that comes out of the kernel while another thread computes (a commit, a deletion) waits
# this long for the interpreter, several times a request.  CPython's 5 ms let 110 requests a second
# through in that case, this 4300; without such a thread it costs nothing that could be measured.
_SWITCH_SECONDS: Final = 0.00005

_READ: Final = int(Opcode.READ)
_WRITE: Final = int(Opcode.WRITE)
_FSYNC: Final = int(Opcode.FSYNC)
_FALLOCATE: Final = int(Opcode.FALLOCATE)
_SECTOR_MASK: Final = SECTOR_SIZE - 1
_NO_DATA: Final = memoryview(b"")
_GONE: Final = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.EBADF})
_TRY_AGAIN: Final = frozenset({errno.ENOENT, errno.EINTR, errno.EAGAIN})

# Opcode, node id and the bytes behind the header -> the answer's payload; None: no answer at all
Handler = Callable[[int, bytes], bytes | None]


class FuseWorkers:
    """Serve the connection *fd* until it is unmounted or aborted."""

    def __init__(
        self, fd: int, files: Mapping[int, ExportedFile], handlers: Mapping[int, Handler]
    ) -> None:
        self.fd = fd
        self.files = files
        self.handlers = handlers
        self._lock = threading.Lock()
        self._workers: tuple[_Worker, ...] = ()
        self._next_number = 0
        self._switch_interval = sys.getswitchinterval()
        self._monitor = threading.Thread(target=self._watch, name="export-monitor", daemon=True)

    def start(self) -> None:
        """Start the threads; the interpreter of this process switches faster until `join`."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        for _ in range(_BASE_WORKERS):
            self._add(extra=False)
        self._monitor.start()

    def join(self) -> bool:
        """Wait for the threads, after the end of the connection; False if a target blocks one."""
        sys.setswitchinterval(self._switch_interval)
        deadline = time.monotonic() + _END_SECONDS
        for thread in (*(worker.thread for worker in self._workers), self._monitor):
            thread.join(max(0.0, deadline - time.monotonic()))
        return not self._workers and not self._monitor.is_alive()

    def count(self) -> int:
        return len(self._workers)

    def busy_with(self, file: ExportedFile) -> int:
        """How many workers are inside the file's target now."""
        return sum(worker.current is file for worker in self._workers)

    def idle(self) -> int:
        return sum(worker.current is None for worker in self._workers)

    def forget(self, worker: "_Worker") -> None:
        with self._lock:
            self._workers = tuple(other for other in self._workers if other is not worker)

    def surplus(self) -> bool:
        """Whether an extra worker may end: the others that wait for requests are enough."""
        return self.idle() > _BASE_WORKERS

    def _add(self, *, extra: bool, first: ExportedFile | None = None) -> None:
        with self._lock:
            self._next_number += 1
            worker = _Worker(self, self._next_number, extra=extra, first=first)
            self._workers = (*self._workers, worker)
        try:
            worker.thread.start()
        except RuntimeError:  # no more threads for this process
            self.forget(worker)
            if not extra:
                raise
            log.warning("cannot start another thread for the export")

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        while self._workers:
            # Sleeps here while nothing is asked of us; under load it only looks now and then
            if _ended(poller.poll()) or not self._watch_load(poller):
                return

    def _watch_load(self, poller: select.poll) -> bool:
        """Add workers while there is load; False when the connection has ended."""
        idle_samples = backlog_samples = 0
        served, cpu, then = self._served(), time.process_time(), time.monotonic()
        while idle_samples < _IDLE_SAMPLES:
            time.sleep(_SAMPLE_SECONDS)
            events = poller.poll(0)
            if _ended(events):
                return False
            before, served = served, self._served()
            cpu_before, cpu = cpu, time.process_time()
            then_before, then = then, time.monotonic()
            waiting = self._release_stalled()
            backlog_samples = backlog_samples + 1 if events else 0
            if not events or self.idle():
                idle_samples = idle_samples + 1 if served == before and not waiting else 0
                continue
            idle_samples = 0
            if served == before:
                self._grow_for_stall()
            elif backlog_samples > 2 and (cpu - cpu_before) < _CPU_BOUND * (then - then_before):
                self._grow(1, _DISK_WORKERS)
        return True

    def _served(self) -> int:
        return sum(worker.served for worker in self._workers)

    def _grow(self, count: int, limit: int) -> None:
        for _ in range(min(count, limit - len(self._workers))):
            self._add(extra=True)

    def _grow_for_stall(self) -> None:
        workers = self._workers
        allowed = _STALLED_WORKERS if len(workers) < _MAX_WORKERS // 2 else 1
        blocked = Counter(worker.current for worker in workers)
        for file, count in blocked.items():
            if file is not None and count >= allowed:
                file.stall()
        self._grow(max(1, len(workers) // 2), _MAX_WORKERS)

    def _release_stalled(self) -> bool:
        """Serve what waits for files with nobody inside; whether a file is still stalled."""
        stalled = [file for file in tuple(self.files.values()) if file.stalled]
        for file in stalled:
            if not self.busy_with(file):
                self._add(extra=True, first=file)
        return bool(stalled)


class _Worker:
    """One thread with buffers of its own."""

    def __init__(
        self, pool: FuseWorkers, number: int, *, extra: bool, first: ExportedFile | None
    ) -> None:
        self.current: ExportedFile | None = first
        self.served = 0
        self._surplus_seen = 0
        self._pool = pool
        self._extra = extra
        self._first = first
        # The prefix of a WRITE takes the place before the buffer, so that its data are page-aligned
        self._prefix = bytearray(PREFIX_SIZE)
        self._data = memoryview(mmap.mmap(-1, MAX_IO))
        self._reply = bytearray(OUT_HEADER.size)
        self._written = bytearray(WRITE_REPLY.size)
        self._views: dict[int, memoryview] = {}
        self.thread = threading.Thread(target=self._run, name=f"export-{number}", daemon=True)

    def _run(self) -> None:
        with suppress(OSError):  # not permitted, or not in this kernel: only a safeguard
            libc.set_io_flusher()
        try:
            if self._first is not None:
                self._serve_waiting(self._first)
                self.current = None
            self._serve()
        finally:
            self._pool.forget(self)

    def _serve(self) -> None:
        fd, into = self._pool.fd, (self._prefix, self._data)
        while True:
            try:
                received = os.readv(fd, into)
            except OSError as err:
                if err.errno in _TRY_AGAIN:
                    continue
                if err.errno not in _GONE:
                    log.exception("cannot read requests of the export")
                return
            try:
                self._dispatch(received)
            except Exception as err:  # noqa: BLE001 - such as no memory; the thread has to go on
                self.current = None
                _, _, unique, *_ = IN_HEADER.unpack_from(self._prefix)
                self._send_error(unique, _errno_of(err, None))
            if self._extra and self._is_surplus():
                return

    def _dispatch(self, received: int) -> None:
        # Offset and length are those of a READ or a WRITE; nonsense for the others
        opcode, unique, node_id, offset, length = REQUEST.unpack_from(self._prefix)
        file = self._pool.files.get(node_id)
        if file is None:
            self._answer(opcode, unique, node_id, received)
        elif opcode in (_READ, _WRITE):
            self._move(file, opcode, unique, offset, length)
        elif opcode == _FSYNC:
            self._other(file, Request(opcode, unique, 0, 0, 0, _NO_DATA))
        elif opcode == _FALLOCATE:
            _, start, count, mode, _ = FALLOCATE_IN.unpack_from(self._prefix, IN_HEADER.size)
            self._other(file, Request(opcode, unique, start, count, mode, _NO_DATA))
        else:
            self._answer(opcode, unique, node_id, received)

    def _is_surplus(self) -> bool:
        self._surplus_seen = self._surplus_seen + 1 if self._pool.surplus() else 0
        return self._surplus_seen >= _SURPLUS_REQUESTS

    def _move(self, file: ExportedFile, opcode: int, unique: int, offset: int, length: int) -> None:
        view = self._views.get(length)
        if view is None:
            view = self._data[:length]
            if not length & _SECTOR_MASK:
                self._views[length] = view
        if file.stalled and file.keep_for_later(
            Request(opcode, unique, offset, length, 0, view if opcode == _WRITE else _NO_DATA)
        ):
            return
        self.current = file
        self._transfer(file, opcode, unique, offset, length, view)
        if file.stalled:
            self._serve_waiting(file)
        self.current = None

    def _transfer(
        self,
        file: ExportedFile,
        opcode: int,
        unique: int,
        offset: int,
        length: int,
        view: memoryview,
    ) -> None:
        try:
            fits = not (offset | length) & _SECTOR_MASK and offset + length <= file.size
            if opcode == _WRITE:
                if fits:
                    file.target.write(offset, view)
                else:
                    file.write_slowly(offset, view)
                WRITE_REPLY.pack_into(self._written, 0, WRITE_REPLY.size, 0, unique, length, 0)
                os.write(self._pool.fd, self._written)
            else:
                if fits:
                    file.target.read(offset, view)
                else:
                    length = file.read_slowly(offset, view)
                    view = view[:length]
                OUT_HEADER.pack_into(self._reply, 0, OUT_HEADER.size + length, 0, unique)
                os.writev(self._pool.fd, (self._reply, view))
        except Exception as err:  # noqa: BLE001 - a bug of the target must not end the thread
            self._send_error(unique, _errno_of(err, file))
        self.served += 1

    def _other(self, file: ExportedFile, request: Request) -> None:
        if file.stalled and file.keep_for_later(request):
            return
        self.current = file
        self._perform(file, request)
        if file.stalled:
            self._serve_waiting(file)
        self.current = None

    def _perform(self, file: ExportedFile, request: Request) -> None:
        try:
            if request.opcode == _FSYNC:
                file.target.flush()
            else:
                file.fallocate(request.offset, request.length, request.mode)
        except Exception as err:  # noqa: BLE001 - as in _transfer
            self._send_error(request.unique, _errno_of(err, file))
        else:
            self._send(request.unique, b"")
        self.served += 1

    def _serve_waiting(self, file: ExportedFile) -> None:
        while (request := file.next_waiting()) is not None:
            opcode, unique, offset, length, _, buffer = request
            if opcode == _WRITE:
                self._transfer(file, opcode, unique, offset, length, buffer)
            elif opcode == _READ:
                self._transfer(file, opcode, unique, offset, length, self._data[:length])
            else:
                self._perform(file, request)

    def _answer(self, opcode: int, unique: int, node_id: int, received: int) -> None:
        handler = self._pool.handlers.get(opcode)
        if handler is None:
            self._send_error(unique, errno.ENOSYS)
            return
        behind = bytes(self._prefix[IN_HEADER.size : received])
        behind += self._data[: max(0, received - PREFIX_SIZE)]
        try:
            payload = handler(node_id, behind)
        except Exception as err:  # noqa: BLE001 - the thread has to go on
            self._send_error(unique, _errno_of(err, None))
        else:
            if payload is not None:
                self._send(unique, payload)

    def _send_error(self, unique: int, number: int) -> None:
        self._write(OUT_HEADER.pack(OUT_HEADER.size, -number, unique))

    def _send(self, unique: int, payload: bytes) -> None:
        self._write(OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + payload)

    def _write(self, message: bytes) -> None:
        try:
            os.write(self._pool.fd, message)
        except OSError as err:
            # ENOENT: the request was aborted, nobody waits for the answer any more
            if err.errno not in _GONE and err.errno != errno.ENOENT:
                log.exception("cannot answer a request of the export")


def _errno_of(error: Exception, file: ExportedFile | None) -> int:
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if file is None:
        log.error("unexpected exception in the export", exc_info=error)
    else:
        file.report(error)
    return errno.EIO


def _ended(events: list[tuple[int, int]]) -> bool:
    return any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in events)
