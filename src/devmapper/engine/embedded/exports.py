"""The activated thin devices of the engine process: a file on its export, or served over NBD.

What stands on such a file (a loop device, a file system) belongs to the clients and is never
touched from here: a thread of this process that waited for it would wait for itself.

Threads: every method may be called from any thread.  One lock guards the table of devices and is
held for the opening and closing of files only; draining I/O happens outside of it.
"""

import errno
import logging
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from devmapper.engine.activation import Event, next_state
from devmapper.engine.embedded.export import Export
from devmapper.engine.embedded.nbd_service import NbdService
from devmapper.engine.embedded.pool import EmbeddedPool, ThinDevice
from devmapper.engine.embedded.records import ExportedDevice
from devmapper.engine.port import Activation, NbdExport, Outcome
from devmapper.errors import DevmapperError, PoolMismatch, PoolUnusable, ThinBusy
from devmapper.units import Bytes, ThinId

log = logging.getLogger(__name__)

_RELEASE_SECONDS: Final = 10.0  # the kernel sends RELEASE some time after the last close
_SETTLE_SECONDS: Final = 1.0  # for who only asks; enough for what a client left in its socket
_POLL_SECONDS: Final = 0.002
_REAP_SECONDS: Final = 0.05
_OPEN_FILE: Final = "an open file of the engine's export"


@dataclass(slots=True)
class _Entry:
    name: str
    thin_id: ThinId
    device: ThinDevice
    state: Activation
    nbd: NbdService | None = None  # instead of a file


class Exports:
    """The devices of one pool on one export."""

    def __init__(self, pool: EmbeddedPool, export: Export) -> None:
        self._pool = pool
        self._export = export
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._leaving = threading.Condition(self._lock)
        self._reaper = threading.Thread(target=self._reap, name="reaper", daemon=True)
        self._reaper.start()

    def activate(self, name: str, thin_id: ThinId, size: Bytes) -> Outcome:
        """Export a thin device under *name*; one that is there already stays as it is."""
        with self._lock:
            if (entry := self._entries.get(name)) is not None:
                _check_thin_id(entry, thin_id)
                if entry.state is Activation.LEAVING:
                    next_state(name, entry.state, Event.ACTIVATE)
                if entry.nbd is not None:
                    raise ThinBusy(name, _nbd_users(entry.nbd))
                return Outcome.ALREADY
            state = next_state(name, Activation.ABSENT, Event.ACTIVATE)
            device = self._pool.open_device(thin_id, size)
            try:
                self._export.add(name, device)
            except BaseException:
                device.close()
                raise
            self._entries[name] = _Entry(name, thin_id, device, state)
        log.info("activated %s (thin id %d, %d bytes)", name, thin_id, size)
        return Outcome.DONE

    def serve_nbd(
        self,
        name: str,
        thin_id: ThinId,
        size: Bytes,
        listener: socket.socket,
        path: Path,
        *,
        read_only: bool,
    ) -> NbdExport:
        """Serve a thin device that is not active on *listener*, which is closed if that fails."""
        with ExitStack() as undo, self._lock:
            undo.callback(listener.close)
            if name in self._entries:
                raise ThinBusy(name, ("its activation",))
            state = next_state(name, Activation.ABSENT, Event.ACTIVATE)
            device = undo.enter_context(self._pool.open_device(thin_id, size))
            service = NbdService(name, device, listener, path, read_only=read_only)
            service.start()
            self._entries[name] = _Entry(name, thin_id, device, state, service)
            undo.pop_all()
        log.info("serving %s (thin id %d, %d bytes) over NBD on %s", name, thin_id, size, path)
        return service.status()

    def deactivate(self, name: str) -> Outcome:
        """Take a device off the export; `ThinBusy` if it has a user who stays for a while."""
        self._settle(_RELEASE_SECONDS, name)
        deadline = time.monotonic() + _RELEASE_SECONDS
        while True:
            with self._lock:
                entry = self._entries.get(name)
                if entry is None:
                    return Outcome.ALREADY
                leaving = entry.state is Activation.LEAVING
                event = Event.LAST_CLOSE if leaving else Event.DEACTIVATE
                next_state(name, entry.state, event)
                if self._remove(entry):
                    break
                if entry.nbd is not None:
                    raise ThinBusy(name, entry.nbd.status().clients)
            if time.monotonic() >= deadline:
                raise ThinBusy(name, (_OPEN_FILE,))
            time.sleep(_POLL_SECONDS)
        log.info("deactivated %s", name)
        return Outcome.DONE

    def defer(self, name: str) -> Outcome:
        """Let a device go away when its file is closed for the last time."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or entry.state is Activation.LEAVING:
                return Outcome.ALREADY
            entry.state = next_state(name, entry.state, Event.DEFER)
            if entry.nbd is not None:
                entry.nbd.admit(new=False)
            self._leaving.notify()
        log.info("removal of %s is deferred to its last close", name)
        return Outcome.DONE

    def cancel_deferred(self, name: str) -> Outcome:
        """Let a device stay that would go away."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or entry.state is not Activation.LEAVING:
                return Outcome.ALREADY
            entry.state = next_state(name, entry.state, Event.CANCEL)
            if entry.nbd is not None:
                entry.nbd.admit(new=True)
        log.info("deferred removal of %s is cancelled", name)
        return Outcome.DONE

    def suspend(self, name: str) -> None:
        """Hold new I/O, wait for what is under way, flush; `ThinBusy` if it cannot be suspended."""
        with self._lock:
            entry = self._entries.get(name)
            state = entry.state if entry is not None else Activation.ABSENT
            after = next_state(name, state, Event.SUSPEND)
            if entry is None:
                raise AssertionError(name)
            entry.state = after
        try:
            entry.device.suspend()
        except BaseException as err:
            with self._lock:
                entry.state = next_state(name, entry.state, Event.RESUME)
            if isinstance(err, OSError):
                raise PoolUnusable(self._pool.status().mode, str(err)) from err
            raise

    def resume(self, name: str) -> None:
        """Let a suspended device go on."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return
            after = next_state(name, entry.state, Event.RESUME)
            entry.device.resume()
            entry.state = after

    def devices(self) -> list[ExportedDevice]:
        """The activated devices, sorted by name."""
        self._settle(_SETTLE_SECONDS)
        with self._lock:
            return [self._describe(entry) for _, entry in sorted(self._entries.items())]

    def close(self, *, force: bool) -> None:
        """Take everything off the export and unmount it.

        `ThinBusy` if a file is open and not *force*; nothing was done then.  With *force* I/O under
        way is waited for, and what comes afterwards fails.
        """
        if not force:
            self._settle(_RELEASE_SECONDS)
        with self._lock:
            for entry in () if force else self._entries.values():
                described = self._describe(entry)
                if described.open_count:
                    users = () if described.nbd is None else described.nbd.clients
                    raise ThinBusy(entry.name, users or (_OPEN_FILE,))
            self._closing = True
            self._leaving.notify()
            entries = list(self._entries.values())
        self._reaper.join()
        for entry in entries:
            if entry.state is Activation.SUSPENDED:
                entry.device.resume()  # threads that it holds could not end
            if entry.nbd is not None:
                entry.nbd.close()
        self._export.close()
        for entry in entries:
            entry.device.close()
        self._entries.clear()

    def _settle(self, seconds: float, only: str | None = None) -> None:
        """Let NBD clients that have gone end, of *only* this device or of all."""
        with self._lock:
            services = [
                entry.nbd
                for entry in self._entries.values()
                # A suspended device holds what they asked for until it is resumed
                if entry.nbd is not None
                and entry.state is not Activation.SUSPENDED
                and only in (None, entry.name)
            ]
        for service in services:
            service.settle(seconds)

    def _describe(self, entry: _Entry) -> ExportedDevice:
        nbd = None if entry.nbd is None else entry.nbd.status()
        users = self._export.open_count(entry.name) if nbd is None else len(nbd.clients)
        size = entry.device.size
        return ExportedDevice(entry.name, entry.thin_id, size, entry.state, users, nbd)

    def _remove(self, entry: _Entry) -> bool:
        """Take a device off the export; False while it has a user."""
        if entry.nbd is not None:
            if not entry.nbd.close_if_idle():
                return False
        elif not self._remove_file(entry.name):
            return False
        del self._entries[entry.name]
        entry.device.close()
        return True

    def _remove_file(self, name: str) -> bool:
        try:
            self._export.remove(name, timeout=0.0)
        except OSError as err:
            if err.errno == errno.EBUSY:
                return False
            raise
        return True

    def _reap(self) -> None:
        """Remove devices that are leaving once they are closed."""
        with self._leaving:
            while not self._closing:
                leaving = [e for e in self._entries.values() if e.state is Activation.LEAVING]
                for entry in leaving:
                    next_state(entry.name, entry.state, Event.LAST_CLOSE)
                    try:
                        if self._remove(entry):
                            log.info("%s was closed and is gone", entry.name)
                    except (DevmapperError, OSError):
                        log.exception("cannot remove %s", entry.name)
                self._leaving.wait(_REAP_SECONDS if leaving else None)


def _check_thin_id(entry: _Entry, thin_id: ThinId) -> None:
    if entry.thin_id != thin_id:
        raise PoolMismatch(
            f"device {entry.name!r} is active with thin id {entry.thin_id}, not {thin_id}"
        )


def _nbd_users(service: NbdService) -> tuple[str, ...]:
    """Why a served device cannot have a file as well: two users of one file system destroy it."""
    return service.status().clients or (f"its NBD socket {str(service.path)!r}",)
