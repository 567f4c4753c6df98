"""The activated thin devices of the engine process: each is a file on its export.

What stands on such a file (a loop device, a file system) belongs to the clients and is never
touched from here: a thread of this process that waited for it would wait for itself.

Threads: every method may be called from any thread.  One lock guards the table of devices and is
held for the opening and closing of files only; draining I/O happens outside of it.
"""

import errno
import logging
import threading
import time
from dataclasses import dataclass
from typing import Final

from devmapper.engine.activation import Event, next_state
from devmapper.engine.embedded.export import Export
from devmapper.engine.embedded.pool import EmbeddedPool, ThinDevice
from devmapper.engine.embedded.records import ExportedDevice
from devmapper.engine.port import Activation, Outcome
from devmapper.errors import DevmapperError, PoolMismatch, PoolUnusable, ThinBusy
from devmapper.units import Bytes, ThinId

log = logging.getLogger(__name__)

_RELEASE_SECONDS: Final = 10.0  # the kernel sends RELEASE some time after the last close
_POLL_SECONDS: Final = 0.002
_REAP_SECONDS: Final = 0.05


@dataclass(slots=True)
class _Entry:
    name: str
    thin_id: ThinId
    device: ThinDevice
    state: Activation


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
                if entry.thin_id != thin_id:
                    raise PoolMismatch(
                        f"device {name!r} is active with thin id {entry.thin_id}, not {thin_id}"
                    )
                if entry.state is Activation.LEAVING:
                    next_state(name, entry.state, Event.ACTIVATE)
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

    def deactivate(self, name: str) -> Outcome:
        """Take a device off the export; `ThinBusy` if its file stays open for a while."""
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
            if time.monotonic() >= deadline:
                raise ThinBusy(name, ("an open file of the engine's export",))
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
        with self._lock:
            return [
                ExportedDevice(
                    entry.name,
                    entry.thin_id,
                    entry.device.size,
                    entry.state,
                    self._export.open_count(entry.name),
                )
                for _, entry in sorted(self._entries.items())
            ]

    def close(self, *, force: bool) -> None:
        """Take everything off the export and unmount it.

        `ThinBusy` if a file is open and not *force*; nothing was done then.  With *force* I/O under
        way is waited for, and what comes afterwards fails.
        """
        with self._lock:
            busy = [name for name in self._entries if self._export.open_count(name)]
            if busy and not force:
                raise ThinBusy(busy[0], ("an open file of the engine's export",))
            self._closing = True
            self._leaving.notify()
            entries = list(self._entries.values())
        self._reaper.join()
        for entry in entries:
            if entry.state is Activation.SUSPENDED:
                entry.device.resume()  # threads that it holds could not end
        self._export.close()
        for entry in entries:
            entry.device.close()
        self._entries.clear()

    def _remove(self, entry: _Entry) -> bool:
        """Take a device off the export; False while its file is open."""
        try:
            self._export.remove(entry.name, timeout=0.0)
        except OSError as err:
            if err.errno == errno.EBUSY:
                return False
            raise
        del self._entries[entry.name]
        entry.device.close()
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
