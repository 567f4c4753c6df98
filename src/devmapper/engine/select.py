"""Which engine serves a pool on this machine."""

import os
from pathlib import Path
from typing import Final, Literal

from devmapper.engine.port import Engine
from devmapper.errors import EnvironmentLacking

Preference = Literal["auto", "kernel", "embedded"]

CONTROL: Final = Path("/dev/mapper/control")


def choose_engine(preference: Preference) -> Engine:
    """The kernel's device mapper where it answers, the embedded engine otherwise.

    `EnvironmentLacking` says what is missing for the one that was asked for.
    """
    if preference != "embedded":
        lacking = kernel_lacks()
        if not lacking:
            from devmapper.engine.kernel.engine import KernelEngine

            return KernelEngine()
        if preference == "kernel":
            raise EnvironmentLacking(
                f"the kernel engine cannot be used: {lacking}",
                hint="leave out --engine, or use --engine embedded",
            )
    from devmapper.engine.embedded import requirements
    from devmapper.engine.embedded.client import EmbeddedEngine

    requirements.check()
    return EmbeddedEngine()


def kernel_lacks() -> str:
    """Why the kernel's device mapper cannot be used; empty if it can."""
    if os.geteuid() != 0:
        return "only root can use it"
    # Before libdevmapper is looked for: this is asked on machines that have neither
    if not CONTROL.exists() and not _misc_has_device_mapper():
        return "this kernel has no device mapper (module dm_mod)"
    from devmapper.engine.kernel.requirements import lacking

    return lacking()


def _misc_has_device_mapper() -> bool:
    with open("/proc/misc", encoding="ascii") as file:
        return any(line.split()[1:] == ["device-mapper"] for line in file)
