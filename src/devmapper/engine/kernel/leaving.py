"""Nodes of devices that leave with their last user, where no udev sees them go.

A node that stays would be the next device's that gets the same number.
"""

from pathlib import Path
from typing import Final

from devmapper.engine import runtime
from devmapper.engine.kernel import devices
from devmapper.linux import dmnode, libdm

_FILE: Final = "leaving"


def note(directory: Path, name: str) -> None:
    """Keep the name of a device that is leaving, so that its node goes with the pool at last."""
    if libdm.udev_sync_support():
        return
    runtime.make_private(directory)
    with open(directory / _FILE, "a", encoding="utf-8") as file:
        file.write(f"{name}\n")


def tidy(name: str) -> None:
    """Remove the node of a device that is not there; call it with the device's lock held."""
    if not libdm.udev_sync_support():
        dmnode.remove(name)


def sweep(directory: Path) -> None:
    """Remove the nodes of the noted devices that have left."""
    file = directory / _FILE
    try:
        names = set(file.read_text(encoding="utf-8").split("\n")) - {""}
    except FileNotFoundError:
        return
    for name in names:
        if devices.find_state(name) is None:
            tidy(name)
    file.unlink()
