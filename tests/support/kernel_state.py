"""What the kernel holds that a test could leave behind, and taking it away again.

Meant for a machine that belongs to the tests: another program's devices would count as well.
"""

import subprocess
import time
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.linux import loop, mount

_SETTLING: Final = 5.0  # seconds: deferred removals and loop devices that detach themselves
_DM_NODES: Final = Path("/dev/mapper")


class Held(NamedTuple):
    """One thing of the kernel: what kind, and the name to take it away by."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def held() -> list[Held]:
    """All there is now: device mapper devices and nodes, loop devices, semaphores, mounts."""
    names = [path.read_text().strip() for path in Path("/sys/block").glob("dm-*/dm/name")]
    nodes = [path.name for path in _DM_NODES.iterdir()] if _DM_NODES.is_dir() else []
    # The udev cookies of libdevmapper are semaphores; the second column is the id
    semaphores = [
        line.split()[1] for line in Path("/proc/sysvipc/sem").read_text().splitlines()[1:]
    ]
    return [
        *(Held("mount", str(entry.mount_point)) for entry in mount.mountinfo()),
        *(Held("device", name) for name in names),
        *(Held("node", name) for name in nodes if name != "control" and name not in names),
        *(Held("loop", str(node)) for node, _ in loop.attached_devices()),
        *(Held("semaphore", number) for number in semaphores),
    ]


def left_since(before: list[Held], *, settling: float = _SETTLING) -> list[Held]:
    """What is there now and was not *before*; *settling* seconds are for what goes by itself."""
    deadline = time.monotonic() + settling
    while True:
        left = [thing for thing in held() if thing not in before]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)  # nothing tells when the last user of a device has let go


def take_away(things: list[Held]) -> None:
    """Remove what a test has left; what can't be removed stays."""
    for thing in reversed(things):
        if thing.kind == "mount":
            mount.unmount(Path(thing.name), flags=mount.UmountFlag.DETACH)
    devices = [thing.name for thing in things if thing.kind == "device"]
    for _ in range(len(devices)):  # one round for each storey that they may be stacked
        devices = [name for name in devices if not _run("dmsetup", "remove", "--force", name)]
    for thing in things:
        if thing.kind == "node":
            (_DM_NODES / thing.name).unlink(missing_ok=True)
        elif thing.kind == "loop":
            loop.detach(Path(thing.name), deferred=True)
        elif thing.kind == "semaphore":
            _run("ipcrm", "-s", thing.name)


def _run(*argv: str) -> bool:
    return subprocess.run(argv, capture_output=True, timeout=60).returncode == 0
