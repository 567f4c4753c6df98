"""Waiting for udev, for a bounded time.

A cookie is a semaphore: libdevmapper counts it up for each event that it causes, and udev's rules
(`dmsetup udevcomplete`) count it down when they are done with the event, which is when links and
nodes are there and nobody probes the device any more.  The library's own `dm_udev_wait` waits for
ever; here a cookie that nobody completes ends in `EngineError`, and its semaphore is destroyed on
every path.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from devmapper.errors import EngineError
from devmapper.linux import libdm, semaphore

TIMEOUT_SECONDS: Final = 30.0


@contextmanager
def cookie(what: str, *, timeout: float | None = None) -> Iterator[int]:
    """A cookie for `libdm.Task.set_cookie`; leaving waits until udev is done with *what*.

    0 where no udev runs: there is nothing to wait for.  After *timeout* seconds `EngineError`:
    then device mapper has done its part and udev has not.
    """
    key = libdm.create_cookie()
    if not key:
        yield 0
        return
    found = semaphore.find(key)
    try:
        yield key
        _wait(found, what, TIMEOUT_SECONDS if timeout is None else timeout)
    finally:
        with suppress(OSError):  # `dmsetup udevcomplete_all` was faster
            semaphore.remove(found)


def _wait(found: int, what: str, timeout: float) -> None:
    try:
        semaphore.decrement(found)  # ours: it starts from 1
        done = semaphore.wait_for_zero(found, timeout)
    except OSError as err:
        if not semaphore.is_gone(err):
            raise
        return  # somebody completed it by force
    if not done:
        raise EngineError(
            f"udev did not complete {what} within {timeout:.0f} seconds",
            hint="see whether systemd-udevd runs: udevadm settle; without udev set"
            " DM_DISABLE_UDEV=1",
        )
