"""What the embedded engine needs of the machine, found out by asking for it once."""

import os
from typing import Final

from devmapper.errors import EnvironmentLacking

_NODES: Final = {
    "/dev/fuse": "load the module fuse, or give this container the device",
    "/dev/loop-control": "load the module loop, or give this container the device",
}


def check() -> None:
    """`EnvironmentLacking` names the first thing that is missing and what to do about it."""
    if os.geteuid() != 0:
        raise EnvironmentLacking(
            "the embedded engine attaches loop devices and mounts, which only root can do",
            hint="run as root; pool check and pool dump work without it",
        )
    for node, hint in _NODES.items():
        try:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as err:
            raise EnvironmentLacking(
                f"the embedded engine cannot use {node}: {err.strerror}", hint=hint
            ) from err
