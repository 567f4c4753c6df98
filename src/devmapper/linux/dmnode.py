"""Nodes and names of device-mapper devices: /dev/mapper and sysfs.

Where udev runs it owns /dev/mapper; where it does not, nodes are ours to make.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.linux.blockdev import DeviceNumber

DIRECTORY: Final = Path("/dev/mapper")
MAX_NAME: Final = 127  # DM_NAME_LEN less the NUL
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9#+\-.:=@_]{1,127}", re.ASCII)
_SYSFS: Final = Path("/sys/dev/block")


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
    temporary = DIRECTORY / f".{os.getpid()}-{number.minor}"
    DIRECTORY.mkdir(exist_ok=True)
    os.mknod(temporary, stat.S_IFBLK | 0o600, wanted)
    temporary.rename(path)
    return path


def remove(name: str) -> None:
    """Remove the node of a device that is gone."""
    path_of(name).unlink(missing_ok=True)


def name_of(number: DeviceNumber) -> str | None:
    """The name of a device-mapper device; None if the device is another kind, or gone."""
    try:
        return _text(_SYSFS / str(number) / "dm/name")
    except FileNotFoundError:
        return None


def device_path(number: DeviceNumber) -> Path:
    """The node of any block device, by its number: `/dev/mapper/NAME` or `/dev/loop3`."""
    name = name_of(number)
    if name is not None:
        return path_of(name)
    kernel_name = (_SYSFS / str(number)).readlink().name
    return Path("/dev", kernel_name.replace("!", "/"))


def holders(number: DeviceNumber, *, suspended: bool = False) -> list[str]:
    """Names of the device-mapper devices that stand on a block device, sorted.

    With *suspended* those only that are.
    """
    try:
        entries = os.listdir(_SYSFS / str(number) / "holders")
    except FileNotFoundError:
        return []
    found = []
    for entry in entries:
        place = Path("/sys/block", entry, "dm")
        with suppress(FileNotFoundError):
            if not suspended or _text(place / "suspended") == "1":
                found.append(_text(place / "name"))
    return sorted(found)


def is_suspended(number: DeviceNumber) -> bool:
    try:
        return _text(_SYSFS / str(number) / "dm/suspended") == "1"
    except FileNotFoundError:
        return False


def _text(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.read()).removesuffix("\n")
