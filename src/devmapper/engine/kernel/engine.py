"""Thin pools of the kernel's device mapper."""

import errno
import logging
from contextlib import suppress
from typing import Final

from devmapper.engine.device_lock import device_lock
from devmapper.engine.kernel import (
    busy,
    devices,
    diagnosis,
    leaving,
    loops,
    metadata_snap,
    recovery,
    tableline,
)
from devmapper.engine.kernel.devices import POOL_FLAGS
from devmapper.engine.kernel.locks import PoolLocks, check_plain
from devmapper.engine.kernel.pool import KernelPool
from devmapper.engine.port import EngineFeatures, Outcome, PoolTable
from devmapper.engine.runtime import check_name
from devmapper.engine.tables import check_same_table, check_table
from devmapper.errors import EngineError, PoolMismatch, ThinBusy
from devmapper.linux import dmnode, libdm
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.libdm import TaskKind

log = logging.getLogger(__name__)

_DEFERRED_REMOVAL: Final = (4, 27)  # dm's version, moby's rule


class KernelEngine:
    """Pools in the kernel; implements `devmapper.engine.port.Engine`."""

    def features(self) -> EngineFeatures:
        with libdm.task(TaskKind.VERSION) as task:
            task.run()
            driver = task.driver_version()
        major, minor, *_ = (int(part) for part in driver.split("."))
        return EngineFeatures(
            name="kernel",
            library_version=libdm.library_version(),
            driver_version=driver,
            udev_sync=libdm.udev_sync_support(),
            udev_sync_needed=True,
            deferred_removal=(major, minor) >= _DEFERRED_REMOVAL,
        )

    def find_pool(self, name: str) -> KernelPool | None:
        """The pool if it is active; what a killed process has left suspended goes on.

        One ioctl, and a look at sysfs for each device on it.
        """
        check_name(name, "pool")
        found = devices.find(name)
        if found is None:
            return None
        if found.target is None:
            return None  # made, but its maker was killed: `activate_pool` clears it
        if found.target.kind != tableline.POOL:
            raise PoolMismatch(
                f"device {name!r} is no thin pool, but has a table of {found.target.kind!r}",
                hint=f"see whose it is: dmsetup table {name}",
            )
        locks = PoolLocks(name)
        recovery.resume_abandoned(name, found.state.number, locks)
        return KernelPool(name, found.state.number, locks)

    def activate_pool(self, name: str, table: PoolTable) -> KernelPool:
        """The pool, made from its two devices; files get loop devices that go with it.

        `PoolMismatch` if it is active with other devices or sizes, or if its metadata have others.
        """
        check_plain(name, "pool")
        check_table(table)
        if (pool := self.find_pool(name)) is not None:
            return _checked(pool, table)
        locks = PoolLocks(name)
        with locks.start():
            if (pool := self.find_pool(name)) is not None:
                return _checked(pool, table)
            _clear_half_made(name)
            with (
                device_lock(table.metadata_device, read_only=table.read_only),
                loops.block_devices(table) as real,
            ):
                _make(name, table, real)
            leaving.sweep(locks.directory)
            metadata_snap.forget(locks.directory)
            metadata_snap.release_left(name)
            pool = self.find_pool(name)
        if pool is None:
            raise EngineError(f"pool {name!r} was removed while it was activated")
        return pool

    def deactivate_pool(self, name: str) -> Outcome:
        """Remove the pool, which commits; idle devices go with it, and its loop devices.

        `ThinBusy` if a device on it is in use; nothing was changed then.
        """
        locks = PoolLocks(check_name(name, "pool"))
        if devices.find_state(name) is None and not locks.directory.exists():
            return Outcome.ALREADY
        with locks.start():
            pool = self.find_pool(name)
            if pool is not None:
                number, names = _check_idle(pool)
                for device in names:
                    pool.deactivate(device)
                busy.remove(name, number)
            else:
                _clear_half_made(name)
            leaving.sweep(locks.directory)
            metadata_snap.forget(locks.directory)
            with suppress(OSError):  # none, or another engine's
                locks.directory.rmdir()
        return Outcome.ALREADY if pool is None else Outcome.DONE


def _make(name: str, table: PoolTable, real: PoolTable) -> None:
    target = tableline.pool_target(real)
    try:
        made = devices.create(name, target, POOL_FLAGS)
    except OSError as err:
        raise diagnosis.explain(err, table, real) from err
    if made is None:
        raise PoolMismatch(f"device {name!r} appeared while pool {name!r} was activated")
    log.info("activated pool %s on %s and %s", name, real.metadata_device, real.data_device)


def _checked(pool: KernelPool, wanted: PoolTable) -> KernelPool:
    active = pool.table()
    check_same_table(pool.name, active, loops.as_in(active, wanted))
    return pool


def _clear_half_made(name: str) -> None:
    """Remove a device that never got a table: whoever made it was killed."""
    state = devices.find_state(name)
    if state is None or state.live_table:
        return
    try:
        devices.remove(name)
    except OSError as err:
        if err.errno != errno.ENXIO:
            raise


def _check_idle(pool: KernelPool) -> tuple[DeviceNumber, list[str]]:
    """The pool's number and the devices on it, which nobody uses; or `ThinBusy`."""
    state = devices.find_state(pool.name)
    if state is None:
        raise EngineError(f"pool {pool.name!r} was removed while it was deactivated")
    names = dmnode.holders(state.number)
    for name in names:
        found = devices.find(name)
        if found is None:
            continue
        # Without a live table: half made by a process that was killed
        if found.target is not None and found.target.kind != tableline.THIN:
            raise ThinBusy(pool.name, (f"device {name!r} on top of it",))
        if found.state.open_count:
            busy.await_idle(name)
    if state.open_count > len(names):
        busy.await_idle(pool.name, expected=len(names))
    return state.number, names
