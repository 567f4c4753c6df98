"""Waiting for a device that somebody else has open for a moment.

udev, blkid and the like open every new block device and let go of it soon.
"""

import errno
import time
from collections.abc import Callable
from typing import Final, TypeVar

from devmapper.engine.port import DeviceInfo, Outcome, ThinPool
from devmapper.errors import ThinBusy
from devmapper.linux import holders

BUSY_TIMEOUT_SECONDS: Final = 5.0  # moby waits 20 s, which its users see as a hang
_PAUSE_SECONDS: Final = 0.05

T = TypeVar("T")


def retry_while_busy(action: Callable[[], T], *, seconds: float = BUSY_TIMEOUT_SECONDS) -> T:
    """Call *action* until it does not raise `ThinBusy` or EBUSY, or the time is up.

    It sleeps: hold no lock that others wait for.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except (ThinBusy, OSError) as err:
            if isinstance(err, OSError) and err.errno != errno.EBUSY:
                raise
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def who_holds(device: DeviceInfo) -> list[str]:
    """Who keeps *device*, in words; nobody where that cannot be told, as of one that has gone."""
    if device.nbd is not None:
        return list(device.nbd.clients)
    try:
        return holders.holders(device.path)
    except OSError:
        return []


def deactivate(
    pool: ThinPool, name: str, *, deferred: bool = False, seconds: float = BUSY_TIMEOUT_SECONDS
) -> Outcome:
    """Deactivate a device of which all that we did with it has ended."""
    return retry_while_busy(lambda: pool.deactivate(name, deferred=deferred), seconds=seconds)
