"""Loop devices on the files of an export, as the clients put and remove them."""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Final

from devmapper.errors import EngineError, EnvironmentLacking
from devmapper.linux import loop, mount
from devmapper.linux.blockdev import device_number

_EXPORT_DEAD: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED})
_DEAD: Final = _EXPORT_DEAD | {errno.ENXIO, errno.ENODEV}
# A plain open (udev's probe, blkid) ends by itself, a mount does not
_PROBE_SECONDS: Final = 0.3


def attach(file: Path) -> Path:
    """The loop device on *file*, attached with direct I/O if there was none."""
    if (node := find(file)) is not None:
        # A deactivation that was killed may have left it marked to go away
        loop.cancel_autoclear(node)
        # One that was killed while it attached: the kernel asks the file for its size, which a
        # pending signal interrupts, and goes on with 0 (Linux 6.18, lo_calculate_size)
        if loop.capacity(node) != os.stat(file).st_size:
            loop.set_capacity(node)
        return node
    try:
        return loop.attach(file, direct_io=True)
    except OSError as err:
        if err.errno == errno.ENODEV:
            raise EnvironmentLacking(
                "no loop device is free",
                hint="load the module loop, or allow this container /dev/loop-control",
            ) from err
        if err.errno in _EXPORT_DEAD:
            raise EngineError("engine process ended while a device was activated") from err
        raise


def find(file: Path) -> Path | None:
    """The loop device on *file*; one that stands on a dead export by the same name is not it."""
    return _find_among(file, loop.find_by_backing_file(file))


def detach(node: Path, *, patient: bool = True) -> bool:
    """Detach a loop device; False if it is in use, if *patient* for longer than a probe lasts."""
    waits = patient and not mount.mounts_of(device_number(node))
    timeout = _PROBE_SECONDS if waits else 0.0
    try:
        loop.detach(node, timeout=timeout)
    except OSError as err:
        if err.errno == errno.EBUSY:
            return False
        raise
    return True


class Survey:
    """All loop devices and mounts at one moment: one look at the system for many questions."""

    def __init__(self) -> None:
        self._nodes: dict[Path, list[Path]] = {}
        for node, backing in loop.attached_devices():
            self._nodes.setdefault(backing, []).append(node)
        self._mounts = Counter(entry.device for entry in mount.mountinfo())

    def find(self, file: Path) -> Path | None:
        """As `find`."""
        return _find_among(file, self._nodes.get(file, []))

    def users(self, node: Path) -> int:
        """How many mounts in this namespace and how many block devices stand on *node*."""
        number = device_number(node)
        try:
            stacked = len(os.listdir(f"/sys/dev/block/{number}/holders"))
        except FileNotFoundError:
            stacked = 0
        # A loop device on a block device is no `holder` in sysfs
        return stacked + len(self._nodes.get(node, ())) + self._mounts[number]


def _find_among(file: Path, nodes: list[Path]) -> Path | None:
    if not nodes:
        return None
    try:
        there = os.stat(file)
    except OSError as err:
        if err.errno == errno.ENOENT or err.errno in _EXPORT_DEAD:
            return None  # taken off the export meanwhile
        raise
    for node in nodes:
        try:
            status = loop.find_status(node)
        except OSError as err:
            if err.errno not in _DEAD:
                raise
            continue
        if status is not None and status.backs(there):
            return node
    return None
