"""The origin of a snapshot while the snapshot is made."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from devmapper.engine.port import Activation, DeviceInfo, Outcome, ThinPool
from devmapper.errors import DevmapperError, ThinBusy

log = logging.getLogger(__name__)


@contextmanager
def quiesced(pool: ThinPool, name: str) -> Iterator[None]:
    """Suspend device *name*, if it is active, so that a mounted file system is consistent.

    A device whose removal is deferred could go away in between: that is cancelled for the time
    being, as moby does (deviceset.go takeSnapshot).
    """
    info = pool.info(name)
    if info is None:
        yield
        return
    with ExitStack() as stack:
        _keep(stack, pool, info)
        try:
            stack.enter_context(pool.suspended(name))
        except ThinBusy:
            # Somebody may have let go of it just now: that needs no graph's lock
            if not _keep(stack, pool, pool.info(name)):
                raise
            stack.enter_context(pool.suspended(name))
        yield


def _keep(stack: ExitStack, pool: ThinPool, info: DeviceInfo | None) -> bool:
    """Cancel a deferred removal until *stack* ends; whether there was one."""
    if info is None or info.state is not Activation.LEAVING:
        return False
    if pool.cancel_deferred(info.name) is Outcome.DONE:
        stack.callback(_let_go_again, pool, info.name)
    return True


def _let_go_again(pool: ThinPool, name: str) -> None:
    try:
        pool.deactivate(name, deferred=True)
    except (DevmapperError, OSError) as err:
        # The snapshot is as good as it was; the device can still be deactivated by a put
        log.warning("device %s stays active after a snapshot of it: %s", name, err)
