"""Who keeps a block device or its file system busy, in words for an error message.

Reads /proc and /sys, and asks only what the kernel has in its memory: no file of the device is
opened, no file system that may be dead is asked, so nothing here can hang.  The answer is a hint:
processes come and go while it is made, and it is bounded in time and length.
"""

import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.linux import libc, loop, mount
from devmapper.linux.blockdev import DeviceNumber, device_number

_MAX_HOLDERS: Final = 10
_MAX_SECONDS: Final = 2.0
_MAX_SECONDS_FOR_ALL: Final = 30.0  # where much is decided by it, and no one waits for an error
_MAX_DESCRIPTORS: Final = 4096
_MAX_MAPS: Final = 1024**2  # bytes of a process's table of mappings


def holders(device: Path) -> list[str]:
    """Name who uses *device*: mounts, processes, devices that stand on it, swap; at most ten.

    Each is like `mounted at '/mnt'`, `block device dm-3`, `loop device '/dev/loop7' on '/mnt/f'`,
    `swap on '/mnt/f'`, `process 42 (cat) uses '/mnt/file'`,
    `process 42 (sleep) has it mounted in another mount namespace`.
    """
    number = device_number(device)
    points = [str(entry.mount_point) for entry in mount.mounts_of(number)]
    found: list[str] = [f"mounted at {point!r}" for point in points]
    found += [f"block device {name}" for name in stacked_devices(number)]
    within = _Within(device, points)
    found += [f"loop device {str(node)!r} on {name!r}" for node, name in _loop_devices(within)]
    found += [f"swap on {name!r}" for name in _swaps(within)]
    for uses in _uses_by_processes(number):
        found += uses
        if len(found) >= _MAX_HOLDERS:
            break
    return found[:_MAX_HOLDERS]


def devices_in_use(devices: Collection[DeviceNumber]) -> set[DeviceNumber]:
    """Those of *devices* of which a process uses files: its root, what it has open or mapped.

    Every process is looked at once for all of them.  A copy of a mount in another mount namespace,
    as each service with one of its own gets, is no use.  What cannot be told within half a minute
    counts as in use.
    """
    unknown = set(devices)
    found: set[DeviceNumber] = set()
    deadline = time.monotonic() + _MAX_SECONDS_FOR_ALL
    for process in _processes():
        if not unknown:
            break
        if time.monotonic() > deadline:
            return found | unknown
        with suppress(OSError):  # it has ended
            found |= unknown & _devices_of(process)
            unknown -= found
    return found


def _uses_by_processes(number: DeviceNumber) -> Iterator[list[str]]:
    """What each process uses of the device, until the time is up."""
    deadline = time.monotonic() + _MAX_SECONDS
    seen_namespaces = {_link(Path("/proc/self/ns/mnt"))}
    for process in _processes():
        if time.monotonic() > deadline:
            return
        with suppress(OSError):
            yield _uses_of(process, number, seen_namespaces)


class _Within:
    """Tells by its name whether a file is the device itself or lies on its file system."""

    def __init__(self, device: Path, points: list[str]) -> None:
        self._nodes = {str(device), os.path.realpath(device)}
        self._points = points

    def __contains__(self, name: str) -> bool:
        return name in self._nodes or any(name.startswith(f"{point}/") for point in self._points)


def _uses_of(process: Path, number: DeviceNumber, seen_namespaces: set[str]) -> list[str]:
    who = f"process {process.name} ({_command(process)})"
    uses = []
    namespace = _link(process / "ns/mnt")
    if namespace and namespace not in seen_namespaces:  # without a name: not ours to look into
        seen_namespaces.add(namespace)
        if any(m.device == number for m in mount.mountinfo(int(process.name))):
            uses.append(f"{who} has it mounted in another mount namespace")
    for link in _open_files(process):
        if number in _devices_behind(link):
            uses.append(f"{who} uses {_link(link)!r}")
            return uses
    if (mapped := _mapped_file(process, number)) is not None:
        uses.append(f"{who} has {mapped!r} mapped")
    return uses


def _devices_of(process: Path) -> set[DeviceNumber]:
    """The devices that the process's files are on, and the block devices that it has open."""
    found: set[DeviceNumber] = set()
    for link in _open_files(process):
        found |= _devices_behind(link)
    with open(process / "maps", "rb") as file:
        for line in file.read(_MAX_MAPS).splitlines():
            fields = line.split(maxsplit=4)
            if len(fields) == 5:
                major, _, minor = fields[3].partition(b":")
                found.add(DeviceNumber(int(major, 16), int(minor, 16)))
    return found


def _devices_behind(link: Path) -> set[DeviceNumber]:
    """The device that what /proc's *link* leads to is on, and the one whose node it is.

    By number: a name would not tell of files in a mount that was detached, or elsewhere.
    """
    try:
        mode, file_system, node = libc.cached_devices(str(link))
    except OSError:
        return set()
    numbers = (file_system, node) if stat.S_ISBLK(mode) else (file_system,)
    return {DeviceNumber(*number) for number in numbers}


def _open_files(process: Path) -> Iterator[Path]:
    yield process / "cwd"
    yield process / "root"
    with suppress(OSError), os.scandir(process / "fd") as entries:
        for count, entry in enumerate(entries):
            if count >= _MAX_DESCRIPTORS:
                return
            yield Path(entry.path)


def _mapped_file(process: Path, number: DeviceNumber) -> str | None:
    """A file on the device that the process runs or has mapped (proc_pid_maps(5))."""
    device = f"{number.major:02x}:{number.minor:02x}".encode()
    with open(process / "maps", "rb") as file:
        text = file.read(_MAX_MAPS)
    for line in text.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[3] == device:
            return os.fsdecode(fields[5])
    return None


def stacked_devices(number: DeviceNumber) -> list[str]:
    """The block devices that stand on a block device, by the kernel's names."""
    try:
        return sorted(os.listdir(f"/sys/dev/block/{number}/holders"))
    except OSError:
        return []


def _loop_devices(within: _Within) -> list[tuple[Path, str]]:
    """Loop devices on the device itself, or on a file of it: they are no `holders` in sysfs."""
    return [(node, str(name)) for node, name in loop.attached_devices() if str(name) in within]


def _swaps(within: _Within) -> list[str]:
    """Swap areas on the device itself or on a file of it (proc_swaps(5))."""
    try:
        text = Path("/proc/swaps").read_bytes()
    except OSError:
        return []
    names = [mount.unescape(line.split()[0]) for line in text.splitlines()[1:] if line.split()]
    return [name for name in names if name in within]


def _processes() -> Iterator[Path]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield Path("/proc") / name


def _command(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
