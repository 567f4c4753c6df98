"""What is on a disk and who has it: signatures, partitions, users, device-mapper names.

Asked of the kernel (sysfs) and of libblkid (`wipefs` of util-linux, which lists and changes
nothing here).  Nothing is cached: a disk can change its use between two questions.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.linux import blockdev, holders, loop, mount
from devmapper.linux.blockdev import opened

_SYSFS: Final = Path("/sys/dev/block")


class Signature(NamedTuple):
    """A file system, partition table, volume label or the like that libblkid recognises."""

    kind: str  # as wipefs names it: "ext4", "gpt", "LVM2_member", "crypto_LUKS" …
    offset: int

    def __str__(self) -> str:
        return f"{self.kind} (at byte {self.offset})"


def signatures(path: Path) -> list[Signature]:
    """Everything that libblkid finds on a device or in a file; `ToolError` if it cannot be read."""
    from devmapper.linux import process  # a pool is made once, and opened often

    done = process.run(
        ["wipefs", "--noheadings", "--output", "OFFSET,TYPE", "--", str(path)]
    ).stdout.decode(errors="replace")
    found = []
    for line in done.splitlines():
        offset, _, kind = line.strip().partition(" ")
        if kind.strip():
            found.append(Signature(kind.strip(), int(offset, 16)))
    return found


def partitions(path: Path) -> list[str]:
    """Names of the partitions that the kernel knows on a disk."""
    directory = _SYSFS / str(blockdev.device_number(path))
    found = []
    with suppress(FileNotFoundError):
        found = [entry.name for entry in directory.iterdir() if (entry / "partition").exists()]
    return sorted(found)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one device or one file, be it by links or by another node."""
    first, second = one.stat(), other.stat()
    if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
        return first.st_rdev == second.st_rdev
    return os.path.samestat(first, second)


def overlaps(one: Path, other: Path) -> bool:
    """Whether they share storage: the same, a disk and its partition, a loop device and its file.

    One level deep; what stands on several levels is held by the kernel and so seen as in use.
    """
    if is_same(one, other):
        return True
    return any(_is_part_of(a, b) for a, b in ((one, other), (other, one)))


def users(path: Path) -> list[str]:
    """Who claims a block device for itself; empty if nobody does.

    A mounted file system, swap, a device that stands on it, another pool.  For a file: those of
    the loop devices on it.
    """
    if not blockdev.is_block_device(path):
        nodes = loop.find_by_backing_file(path)
        return [f"loop device {str(node)!r}" for node in nodes if _is_claimed(node)]
    try:
        with opened(path, os.O_RDONLY | os.O_EXCL):
            pass
    except OSError as err:
        if err.errno != errno.EBUSY:
            raise
        return holders.holders(path) or _users_of_partitions(path) or ["the kernel"]
    return _users_of_partitions(path)


def dm_uuid(name: str) -> str | None:
    """UUID of the active device-mapper device *name* ("" where it has none); None if not active.

    From sysfs, so that it needs neither libdevmapper nor a node below /dev/mapper.
    """
    with suppress(FileNotFoundError):
        for entry in Path("/sys/block").iterdir():
            if not entry.name.startswith("dm-"):
                continue
            with suppress(OSError):  # gone meanwhile
                if (entry / "dm/name").read_text(encoding="utf-8").rstrip("\n") == name:
                    return (entry / "dm/uuid").read_text(encoding="ascii").rstrip("\n")
    return None


def _is_claimed(node: Path) -> bool:
    try:
        return loop.is_open_exclusively(node)
    except OSError as err:
        if err.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            return False  # detached meanwhile
        raise


def _users_of_partitions(path: Path) -> list[str]:
    """A disk can be opened exclusively although a partition of it is mounted."""
    found = []
    for name in partitions(path):
        number = (Path("/sys/class/block") / name / "dev").read_text(encoding="ascii").strip()
        major, minor = map(int, number.split(":"))
        places = mount.mounts_of(blockdev.DeviceNumber(major, minor))
        found += [f"{name}, mounted at {str(place.mount_point)!r}" for place in places]
        holding = Path("/sys/class/block") / name / "holders"
        found += [f"{name}, used by {entry}" for entry in sorted(os.listdir(holding))]
    return found


def _is_part_of(part: Path, whole: Path) -> bool:
    if not blockdev.is_block_device(part):
        return False
    number = blockdev.device_number(part)
    if blockdev.is_block_device(whole):
        directory = (_SYSFS / str(number)).resolve()
        if not (directory / "partition").exists():
            return False
        disk = (directory.parent / "dev").read_text(encoding="ascii").strip()
        return disk == str(blockdev.device_number(whole))
    if number.major != loop.LOOP_MAJOR:
        return False
    status = loop.find_status(part.resolve())
    return status is not None and status.backs(whole.stat())
