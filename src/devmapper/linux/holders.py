"""Who keeps a block device or its file system busy, in words for an error message.

Reads /proc and /sys only: no file of the device is opened, so nothing here can hang on it.  The
answer is a hint: processes come and go while it is made, and it is bounded in time and length.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.linux import mount
from devmapper.linux.blockdev import DeviceNumber, device_number

_MAX_HOLDERS: Final = 10
_MAX_SECONDS: Final = 2.0
_MAX_DESCRIPTORS: Final = 4096


def holders(device: Path) -> list[str]:
    """Name who uses *device*: mounts, processes, devices that stand on it; at most ten.

    Each is like `mounted at '/mnt'`, `process 42 (sleep) in another mount namespace`,
    `process 42 (cat) has '/mnt/file' open`, `block device dm-3`.
    """
    number = device_number(device)
    found: list[str] = [f"mounted at {str(m.mount_point)!r}" for m in mount.mounts_of(number)]
    found += [f"block device {name}" for name in stacked_devices(number)]
    deadline = time.monotonic() + _MAX_SECONDS
    own_namespace = _link(Path("/proc/self/ns/mnt"))
    seen_namespaces = {own_namespace}
    points = [str(entry.mount_point) for entry in mount.mounts_of(number)]
    nodes = _names_of(device)
    for process in _processes():
        if len(found) >= _MAX_HOLDERS or time.monotonic() > deadline:
            break
        with suppress(OSError):
            found += _uses_of(process, number, nodes, points, seen_namespaces)
    return found[:_MAX_HOLDERS]


def _uses_of(
    process: Path,
    number: DeviceNumber,
    nodes: frozenset[str],
    points: list[str],
    seen_namespaces: set[str],
) -> list[str]:
    who = f"process {process.name} ({_command(process)})"
    visible = points
    uses = []
    namespace = _link(process / "ns/mnt")
    if namespace and namespace not in seen_namespaces:  # without a name: not ours to look into
        seen_namespaces.add(namespace)
        there = [m for m in mount.mountinfo(int(process.name)) if m.device == number]
        if there:
            uses.append(f"{who} has it mounted in another mount namespace")
            visible = [str(entry.mount_point) for entry in there]
    for name in _open_names(process):
        if name in nodes or any(name == p or name.startswith(p + "/") for p in visible):
            uses.append(f"{who} uses {name!r}")
            break
    return uses


def _open_names(process: Path) -> Iterator[str]:
    # Names of links, not stat(): that would ask a file system which may be dead
    yield _link(process / "cwd")
    yield _link(process / "root")
    with suppress(OSError), os.scandir(process / "fd") as entries:
        for count, entry in enumerate(entries):
            if count >= _MAX_DESCRIPTORS:
                return
            yield _link(Path(entry.path))


def _names_of(device: Path) -> frozenset[str]:
    names = {str(device), os.path.realpath(device)}
    with suppress(OSError):  # another node of the same device, such as /dev/dm-0
        kernel_name = Path(f"/sys/dev/block/{device_number(device)}").readlink().name
        names.add(f"/dev/{kernel_name.replace('!', '/')}")
    return frozenset(names)


def stacked_devices(number: DeviceNumber) -> list[str]:
    """The block devices that stand on a block device, by the kernel's names."""
    try:
        return sorted(os.listdir(f"/sys/dev/block/{number}/holders"))
    except OSError:
        return []


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
