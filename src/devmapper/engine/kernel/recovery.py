"""Devices that a killed process has left suspended: found, proven abandoned, resumed."""

import logging

from devmapper.engine.kernel import devices
from devmapper.engine.kernel.devices import POOL_FLAGS, THIN_FLAGS
from devmapper.engine.kernel.locks import PoolLocks
from devmapper.linux import dmnode
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.libdm import UdevFlag

log = logging.getLogger(__name__)


def resume_abandoned(pool: str, number: DeviceNumber, locks: PoolLocks) -> None:
    """Resume the pool and the devices on it where nobody is left who has suspended them.

    Costs a look at sysfs for each device.
    """
    if dmnode.is_suspended(number):
        resume_if_abandoned(pool, locks, flags=POOL_FLAGS)
    for name in dmnode.holders(number, suspended=True):
        resume_if_abandoned(name, locks)


def resume_if_abandoned(name: str, locks: PoolLocks, *, flags: UdevFlag = THIN_FLAGS) -> bool:
    """Resume a device unless a living process holds it suspended; whether it goes on now."""
    with locks.abandoned(name) as is_abandoned:
        if not is_abandoned:
            return False
        state = devices.find_state(name)
        if state is not None and state.suspended:
            devices.resume(name, flags)
            log.warning("device %s was left suspended by a killed process and goes on now", name)
        return True
