"""Removing devices that are in use, or seem to be: whose fault it is, and whom to wait for."""

import errno
import time
from pathlib import Path
from typing import Final

from devmapper.engine.kernel import devices
from devmapper.errors import ThinBusy
from devmapper.linux import dmnode, mount
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.holders import holders, stacked_devices

# A plain open (udev's probe, blkid) ends by itself, a mount does not
_PROBE_SECONDS: Final = 0.3
_PAUSE_SECONDS: Final = 0.005


def remove(name: str, number: DeviceNumber) -> None:
    """Remove a device; `ThinBusy` with who uses it.

    Somebody who only looks at it, and lets go soon, is waited for.
    """
    deadline: float | None = None
    while True:
        try:
            devices.remove(name)
        except OSError as err:
            if err.errno == errno.ENXIO:  # gone meanwhile, as it should
                return
            if err.errno != errno.EBUSY:
                raise
            now = time.monotonic()
            if deadline is None:
                deadline = now if _is_claimed(number) else now + _PROBE_SECONDS
            if now >= deadline:
                raise busy(name) from err
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def busy(name: str, path: Path | None = None) -> ThinBusy:
    """The error for a device in use, with who uses it."""
    try:
        return ThinBusy(name, holders(path or dmnode.path_of(name)))
    except OSError:
        return ThinBusy(name)


def _is_claimed(number: DeviceNumber) -> bool:
    return bool(mount.mounts_of(number) or stacked_devices(number))
