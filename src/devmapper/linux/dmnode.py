"""Nodes and names of device-mapper devices: /dev/mapper and sysfs.

Where udev runs it owns /dev/mapper; where it does not, nodes are ours to make.
"""

import errno
import os
import re
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.linux.blockdev import DeviceNumber

DIRECTORY: Final = Path("/dev/mapper")
MAX_NAME: Final = 127  # DM_NAME_LEN less the NUL
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9#+\-.:=@_]{1,127}", re.ASCII)
_SYSFS: Final = "/sys/dev/block"
_ATTRIBUTE_SIZE: Final = 4096


def is_plain(name: str) -> bool:
    """Whether udev and dmsetup spell the name of a device as the kernel has it.

    Other characters they replace by escapes, so that the node has another name than the device.
    """
    return _PLAIN_NAME.fullmatch(name) is not None


def path_of(name: str) -> Path:
    """Where the node of the device *name* is."""
    return DIRECTORY / name


def ensure(name: str, number: DeviceNumber) -> Path:
    """The node of a device, made if neither udev nor the library did."""
    path = path_of(name)
    wanted = os.makedev(number.major, number.minor)
    with suppress(FileNotFoundError):
        found = path.stat()
        if stat.S_ISBLK(found.st_mode) and found.st_rdev == wanted:
            return path
    # One that is there is left from a device that went away without udev
    temporary = DIRECTORY / f".{os.getpid()}-{threading.get_ident()}-{number.minor}"
    DIRECTORY.mkdir(exist_ok=True)
    temporary.unlink(missing_ok=True)  # of a killed process that had our id
    os.mknod(temporary, stat.S_IFBLK | 0o600, wanted)
    temporary.rename(path)
    return path


def remove(name: str) -> None:
    """Remove the node of a device that is gone."""
    path_of(name).unlink(missing_ok=True)


def name_of(number: DeviceNumber) -> str | None:
    """The name of a device-mapper device; None if the device is another kind, or gone."""
    return _attribute(f"{_SYSFS}/{number}/dm/name")


def device_path(number: DeviceNumber) -> Path:
    """The node of any block device, by its number: `/dev/mapper/NAME` or `/dev/loop3`."""
    name = name_of(number)
    if name is not None:
        return path_of(name)
    kernel_name = Path(f"{_SYSFS}/{number}").readlink().name
    return Path("/dev", kernel_name.replace("!", "/"))


def holders(number: DeviceNumber, *, suspended: bool = False) -> list[str]:
    """Names of the device-mapper devices that stand on a block device, sorted.

    With *suspended* those only that are.
    """
    try:
        entries = os.listdir(f"{_SYSFS}/{number}/holders")
    except FileNotFoundError:
        return []
    found = []
    for entry in entries:
        if suspended and _attribute(f"/sys/block/{entry}/dm/suspended") != "1":
            continue
        name = _attribute(f"/sys/block/{entry}/dm/name")
        if name is not None:
            found.append(name)
    return sorted(found)


def is_suspended(number: DeviceNumber) -> bool:
    return _attribute(f"{_SYSFS}/{number}/dm/suspended") == "1"


def _attribute(path: str) -> str | None:
    """What sysfs says; None for a device that is gone, or going while we ask (EINVAL, ENODEV)."""
    # Thousands of these are read at once: no more system calls than it takes
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.fsdecode(os.read(fd, _ATTRIBUTE_SIZE)).removesuffix("\n")
    except OSError as err:
        if err.errno in (errno.EINVAL, errno.ENODEV, errno.ENXIO):
            return None
        raise
    finally:
        os.close(fd)
