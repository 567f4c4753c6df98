"""What a snapshot takes beyond its parent: blocks that are its own, and inodes."""

from devmapper.engine.port import DeviceInfo, ThinPool
from devmapper.linux import blockdev, mount
from devmapper.linux.fs_inodes import inodes_below, inodes_on
from devmapper.units import Bytes, ThinId


def own_bytes(pool: ThinPool, thin_id: ThinId, parent: ThinId) -> Bytes:
    """Bytes in blocks that a thin device does not have in common with its parent.

    containerd's own takes the difference of what both map, which overlooks what was overwritten,
    and says less than nothing of a view.
    """
    return Bytes(pool.own_blocks(thin_id, parent) * pool.status().block_size)


def inodes_of(info: DeviceInfo) -> int:
    """Inodes in use of the file system on an active device, mounted or not."""
    if info.open_count > 0 and blockdev.is_block_device(info.path):
        for entry in mount.mounts_of(blockdev.device_number(info.path)):
            return inodes_below(entry.mount_point)
    return inodes_on(info.path)
