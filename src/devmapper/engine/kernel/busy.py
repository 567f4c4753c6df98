"""Devices that are in use, or seem to be: whom to wait for, and whom to name.

udev opens a device after each event and after each close of a writer, to probe it.  While it has
events to handle, somebody who only looks is waited for; a mount or a device on top is not.
"""

import errno
import time
from pathlib import Path
from typing import Final

from devmapper.engine.kernel import devices
from devmapper.errors import ThinBusy
from devmapper.linux import dmnode, libdm, mount
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.holders import holders, stacked_devices

_UDEV_QUEUE: Final = Path("/run/udev/queue")  # there while udevd has events to handle
_PROBE_SECONDS: Final = 5.0
_NOTICE_SECONDS: Final = 0.1  # until udevd has seen that a writer closed the device
_PAUSE_SECONDS: Final = 0.005


class Patience:
    """How long to wait for the users of a device that has to be idle."""

    def __init__(self, name: str, number: DeviceNumber) -> None:
        self._name = name
        self._number = number
        self._start = time.monotonic()

    def wait(self) -> None:
        """Wait a moment, or raise `ThinBusy` if that is of no use."""
        if not libdm.udev_sync_support() or self._is_claimed():
            raise busy(self._name)
        waited = time.monotonic() - self._start
        if waited > (_PROBE_SECONDS if _UDEV_QUEUE.exists() else _NOTICE_SECONDS):
            raise busy(self._name)
        time.sleep(_PAUSE_SECONDS)

    def _is_claimed(self) -> bool:
        return bool(mount.mounts_of(self._number) or stacked_devices(self._number))


def remove(name: str, number: DeviceNumber) -> None:
    """Remove a device; `ThinBusy` with who uses it.  One that is gone meanwhile is fine."""
    patience = None
    while True:
        try:
            devices.remove(name)
        except OSError as err:
            if err.errno == errno.ENXIO:
                return
            if err.errno != errno.EBUSY:
                raise
        else:
            return
        patience = patience or Patience(name, number)
        patience.wait()


def await_idle(name: str, *, expected: int = 0) -> None:
    """Return when no more than *expected* have the device open, or raise `ThinBusy`."""
    patience = None
    while (state := devices.find_state(name)) is not None and state.open_count > expected:
        patience = patience or Patience(name, state.number)
        patience.wait()


def busy(name: str, path: Path | None = None) -> ThinBusy:
    """The error for a device in use, with who uses it."""
    try:
        return ThinBusy(name, holders(path or dmnode.path_of(name)))
    except OSError:
        return ThinBusy(name)
