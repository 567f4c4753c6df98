"""Growing a pool while it is in use."""

import logging

from devmapper.engine.kernel import devices, errors, loops, tableline
from devmapper.engine.kernel.devices import POOL_FLAGS
from devmapper.engine.port import PoolTable
from devmapper.engine.tables import check_same_table, check_table
from devmapper.errors import PoolMismatch

log = logging.getLogger(__name__)


def resize(name: str, active: PoolTable, wanted: PoolTable) -> None:
    """Let the pool have the table *wanted*, which is longer, and all of its metadata device.

    The new table is loaded first and taken by the resume, which suspends the pool for just that:
    whoever is killed on the way leaves a pool that works.  If the kernel refuses the new table, the
    old one is put back.
    """
    check_table(wanted)
    wanted = loops.as_in(active, wanted)
    _check_successor(name, active, wanted)
    loops.take_new_sizes(active)
    devices.load(name, tableline.pool_target(wanted))
    try:
        devices.resume(name, POOL_FLAGS)
    except BaseException as err:
        _put_back(name, active, err)
        raise


def _check_successor(name: str, active: PoolTable, wanted: PoolTable) -> None:
    check_same_table(name, active, wanted._replace(data_size=active.data_size))
    if wanted.data_size < active.data_size:
        raise PoolMismatch(
            f"pool {name!r} has {active.data_size} bytes and cannot shrink to {wanted.data_size}"
        )


def _put_back(name: str, table: PoolTable, error: BaseException) -> None:
    """Where the resume failed the pool is suspended: with its old table it goes on."""
    state = devices.find_state(name)
    if state is None or not state.suspended:
        return
    log.warning("pool %s did not take its new table, it gets the old one back: %s", name, error)
    try:
        devices.load(name, tableline.pool_target(table))
        devices.resume(name, POOL_FLAGS)
    except OSError as err:
        raise errors.stays_suspended("pool", name, err) from err
