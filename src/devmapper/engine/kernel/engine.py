"""Pools of the kernel's device mapper: found, activated, deactivated."""

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from devmapper.engine.device_lock import device_lock
from devmapper.engine.kernel import preflight, targets, translation
from devmapper.engine.kernel.pool import KernelPool
from devmapper.engine.port import EngineFeatures, Outcome, PoolTable
from devmapper.engine.runtime_dir import check_name, pool_lock, runtime_base
from devmapper.errors import PoolMismatch, ThinBusy
from devmapper.linux import blockdev, dm, libdm, loop
from devmapper.linux.libdm import TaskKind

_LOCK_SECONDS: Final = 180.0
_DEFERRED_REMOVAL: Final = (4, 27)  # of the driver; moby `deviceset.go` determineDriverCapabilities


class KernelEngine:
    """Implements `devmapper.engine.port.Engine`."""

    def features(self) -> EngineFeatures:
        with libdm.task(TaskKind.VERSION) as task:
            task.run()
            version = task.driver_version()
        numbers = tuple(int(word) for word in version.split(".")[:2])
        return EngineFeatures(
            name="kernel",
            library_version=libdm.library_version(),
            driver_version=version,
            udev_sync=libdm.udev_sync_support(),
            udev_sync_needed=True,
            deferred_removal=numbers >= _DEFERRED_REMOVAL,
        )

    def find_pool(self, name: str) -> KernelPool | None:
        """The pool if it is active; what dead processes left suspended in it goes on."""
        check_name(name, "pool")
        found = dm.find_table(name)
        if found is None or not found.state.live_table:
            return None
        kinds = [target.kind for target in found.targets]
        if kinds != [targets.POOL]:
            raise PoolMismatch(
                f"device {name!r} has a target {' '.join(kinds) or 'of none'!r}, expected"
                f" {targets.POOL!r}",
                hint="name a thin pool; with LVM that may be the name with -tpool at its end",
            )
        pool = KernelPool(name)
        pool.recover()
        return pool

    def activate_pool(self, name: str, table: PoolTable) -> KernelPool:
        """Make the pool's device; files get loop devices, which live as long as it does.

        `PoolMismatch` if it is active with other devices or sizes, or if its metadata are of
        another pool; `PoolBusy` if another engine has it open.
        """
        check_name(name, "pool")
        with pool_lock(Path(os.path.realpath(runtime_base())), name, _LOCK_SECONDS):
            if (pool := self.find_pool(name)) is not None:
                _check_table(pool, table)
                return pool
            preflight.check(table)
            with ExitStack() as stack:
                stack.enter_context(device_lock(table.metadata_device, read_only=table.read_only))
                devices = table._replace(
                    metadata_device=_as_block_device(table.metadata_device, stack),
                    data_device=_as_block_device(table.data_device, stack),
                )
                self._create(name, devices)
            return KernelPool(name)

    def deactivate_pool(self, name: str) -> Outcome:
        check_name(name, "pool")
        with pool_lock(Path(os.path.realpath(runtime_base())), name, _LOCK_SECONDS):
            pool = self.find_pool(name)
            if pool is None:
                return Outcome.ALREADY
            devices = pool.devices()
            for device in devices:
                if device.open_count:
                    with translation.of_removal(device.name, device.path):
                        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), device.name)
            for device in devices:
                pool.deactivate(device.name)
            try:
                dm.remove(name)
            except OSError as err:
                if err.errno == errno.EBUSY:
                    raise ThinBusy(name, dm.stacked_on(_number(name))) from err
                raise translation.of_udev(err) from err
            return Outcome.DONE

    def _create(self, name: str, table: PoolTable) -> None:
        target = targets.pool_target(table)
        state = dm.find(name)
        if state is not None and not state.live_table:  # its maker died before it had a table
            dm.remove(name)
        try:
            dm.create(name, [target], flags=dm.POOL_FLAGS, read_only=table.read_only)
        except OSError as err:
            err.add_note(f"table: {target.start} {target.length} {target.kind} {target.params}")
            raise translation.of_udev(err) from err


def _as_block_device(path: Path, stack: ExitStack) -> Path:
    if blockdev.is_block_device(path):
        return path
    return stack.enter_context(loop.attached_while_open(path))


def _number(name: str) -> blockdev.DeviceNumber:
    state = dm.find(name)
    return blockdev.DeviceNumber(0, 0) if state is None else state.number


def _check_table(pool: KernelPool, wanted: PoolTable) -> None:
    active = pool.table()
    for field in ("metadata_device", "data_device", "data_size", "block_size", "read_only"):
        found, expected = getattr(active, field), getattr(wanted, field)
        if isinstance(expected, Path) and _stands_on(found, expected):
            continue
        if found != expected:
            raise PoolMismatch(
                f"pool {pool.name!r} is active with {field} {str(found)!r}, expected"
                f" {str(expected)!r}",
                hint="deactivate it first, or give the options that it was made with",
            )


def _stands_on(device: Path, wanted: Path) -> bool:
    """Whether *device* is *wanted*, or a loop device on that file."""
    there = wanted.stat()
    if blockdev.is_block_device(wanted):
        return device.stat().st_rdev == there.st_rdev
    status = loop.find_status(device) if device.name.startswith("loop") else None
    return status is not None and status.backs(there)
