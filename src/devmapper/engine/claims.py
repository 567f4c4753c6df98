"""Whether the kernel uses the device or the file that a pool is to stand on.

The engines keep each other out with `device_lock`; a pool of device mapper, be it ours or not,
holds no such lock, but claims its devices.
"""

from pathlib import Path

from devmapper.errors import PoolBusy
from devmapper.linux import holders, loop


def check_unclaimed(path: Path) -> None:
    """`PoolBusy`, with who it is, if the kernel has *path* mounted or stacked upon.

    For a file: a loop device on it, under whatever name.  Two writers would destroy the pool, and
    a dockerd that was killed leaves its pool active.  A loop device that nothing uses does no harm.
    """
    found = path.stat()
    if found.st_rdev:
        nodes = [path]
    else:
        nodes = [status.path for status in loop.find_by_inode(found) if not status.read_only]
    for node in nodes:
        if loop.is_open_exclusively(node):
            raise PoolBusy(path, ", ".join(holders.holders(node)) or f"the kernel, by {node}")
