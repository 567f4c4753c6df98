"""Letting go of every device of a pool."""

import errno

from devmapper.deviceset.busy import deactivate, retry_while_busy, who_holds
from devmapper.engine.port import DeviceInfo, ThinPool
from devmapper.errors import LayerBusy, ThinBusy
from devmapper.linux import blockdev, mount

_SECONDS = 1.0


def release_devices(pool: ThinPool) -> None:
    """Unmount and deactivate all devices; those in use stay, and `LayerBusy` names the first.

    moby detaches mounts lazily and ignores errors, which leaves devices that nobody sees.
    """
    failed: list[LayerBusy] = []
    for device in pool.devices():
        try:
            _unmount_all(device)
            deactivate(pool, device.name, seconds=_SECONDS)
        except (ThinBusy, OSError) as err:
            if isinstance(err, OSError) and err.errno != errno.EBUSY:
                raise
            busy = LayerBusy(device.name, who_holds(device))
            busy.__cause__ = err
            failed.append(busy)
    for other in failed[1:]:
        failed[0].add_note(str(other))
    if failed:
        raise failed[0]


def _unmount_all(device: DeviceInfo) -> None:
    if not blockdev.is_block_device(device.path):
        return
    places = mount.mounts_of(blockdev.device_number(device.path))
    for place in reversed(places):
        point = place.mount_point
        retry_while_busy(lambda point=point: mount.unmount(point), seconds=_SECONDS)  # type: ignore[misc]
