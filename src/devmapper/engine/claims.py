"""Whether the kernel uses the device or the file that a pool is to stand on.

The engines keep each other out with `device_lock`; a pool of device mapper, be it ours or not,
holds no such lock, but claims its devices.
"""

import os
from pathlib import Path

from devmapper.errors import PoolBusy
from devmapper.linux import blockdev, holders, loop


def check_unclaimed(path: Path) -> None:
    """`PoolBusy`, with who it is, if the kernel has *path* mounted or stacked upon."""
    found = path.stat()
    if found.st_rdev:
        if loop.is_open_exclusively(path):
            raise PoolBusy(path, ", ".join(holders.holders(path)) or "the kernel")
        return
    for node in loop.find_by_backing_file(Path(os.path.realpath(path))):
        status = loop.find_status(node)
        if status is None or not status.backs(found):
            continue  # another file that had this name
        above = holders.stacked_devices(blockdev.device_number(node))
        if above:
            raise PoolBusy(path, f"block device {above[0]} on {node}")
