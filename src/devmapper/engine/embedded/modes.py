"""The mode of a pool: who may write, who waits for space, who is refused.

The modes and their order are the kernel's (`dm-thin.c: set_pool_mode`):

    WRITE <-> OUT_OF_DATA_SPACE      no free data block <-> space has appeared
    either -> READ_ONLY              a metadata operation failed, or the table says so
    any    -> FAIL                   metadata cannot be read any more

Nothing leads back from READ_ONLY and FAIL but closing the pool and a check.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from devmapper.engine.port import PoolMode
from devmapper.errors import PoolUnusable

log = logging.getLogger(__name__)

NO_SPACE_TIMEOUT: Final = 60.0  # seconds, `no_space_timeout` of the kernel's module
_LONGEST_WAIT: Final = 3600.0


class PoolState:
    """Mode of one pool; `writable` is read on the data path without a lock."""

    def __init__(self, name: str, *, no_space_timeout: float = NO_SPACE_TIMEOUT) -> None:
        self.name = name
        self.mode = PoolMode.WRITE
        self.writable = True
        self.reason = ""
        self.low_water_reached = False
        self.error_if_no_space = False
        self._failed = False
        self._no_space_timeout = no_space_timeout
        self._give_up_at = 0.0
        self._changed = threading.Condition()

    def run_out_of_data_space(self) -> None:
        """No data block is free: writes that need one wait, or fail at once."""
        with self._changed:
            if self.mode is not PoolMode.WRITE:
                return
            self.mode = PoolMode.OUT_OF_DATA_SPACE
            self._give_up_at = time.monotonic() + self._no_space_timeout
        log.warning("pool %s: out of data space", self.name)

    def find_space(self) -> None:
        """Data blocks are free again: what waits for them goes on."""
        with self._changed:
            if self.mode is not PoolMode.OUT_OF_DATA_SPACE:
                return
            self.mode = PoolMode.WRITE
            self._changed.notify_all()
        log.info("pool %s: has data space again", self.name)

    def wait_for_space(self, abandoned: Callable[[], bool]) -> None:
        """Return when the pool has space, or is not waited for any more; else ENOSPC.

        The time counts from the moment when the pool ran out, so who comes later than that fails
        at once (`dm-thin.c: do_no_space_timeout`).
        """
        with self._changed:
            while self.mode is PoolMode.OUT_OF_DATA_SPACE and not abandoned():
                left = self._give_up_at - time.monotonic()
                if left <= 0 or self.error_if_no_space:
                    raise OSError(errno.ENOSPC, f"pool {self.name} is out of data space")
                self._changed.wait(min(left, _LONGEST_WAIT))

    def wake(self) -> None:
        """Let those who wait for space look again whether they still do."""
        with self._changed:
            self._changed.notify_all()

    def make_read_only(self, reason: str, *, failed: bool) -> None:
        """Refuse writes from now on; *failed* unless that is what was asked for."""
        self._degrade(PoolMode.READ_ONLY, reason, failed=failed)

    def fail(self, reason: str) -> None:
        """Metadata cannot be read: refuse everything."""
        self._degrade(PoolMode.FAIL, reason, failed=True)

    def check_writable(self) -> None:
        """EROFS when the pool was opened read-only, EIO when it became so by a failure."""
        if not self.writable:
            code = errno.EIO if self._failed else errno.EROFS
            raise OSError(code, f"pool {self.name} is in mode {self.mode}: {self.reason}")

    def check_flushable(self) -> None:
        """EIO after a failure: writes that were taken may be lost, which a flush must not hide."""
        if self._failed:
            self.check_writable()

    def check_changeable(self) -> None:
        """`PoolUnusable` where messages to the pool are refused."""
        if not self.writable:
            raise PoolUnusable(self.mode, self.reason)

    def _degrade(self, mode: PoolMode, reason: str, *, failed: bool) -> None:
        with self._changed:
            if self.mode is PoolMode.FAIL or self.mode is mode:
                return
            self.mode = mode
            self.reason = reason
            self._failed = self._failed or failed
            self.writable = False
            self._changed.notify_all()
        log.log(
            logging.ERROR if failed else logging.INFO, "pool %s: %s: %s", self.name, mode, reason
        )
