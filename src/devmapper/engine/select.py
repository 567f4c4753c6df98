"""Which engine serves a pool on this machine."""

import importlib
import importlib.util
import os
from typing import Final, Literal, cast

from devmapper.engine.port import Engine
from devmapper.errors import EnvironmentLacking

Preference = Literal["auto", "kernel", "embedded"]

_CONTROL: Final = "/dev/mapper/control"
_KERNEL_MODULE: Final = "devmapper.engine.kernel.engine"


def choose_engine(preference: Preference) -> Engine:
    """The kernel's device mapper where it answers, the embedded engine otherwise.

    `EnvironmentLacking` says what is missing for the one that was asked for.
    """
    if preference != "embedded":
        lacking = kernel_lacks()
        if not lacking:
            module = importlib.import_module(_KERNEL_MODULE)
            return cast("Engine", module.KernelEngine())
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
    if importlib.util.find_spec(_KERNEL_MODULE) is None:
        return "this version of devmapper has no kernel engine"
    try:
        os.close(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        return f"{_CONTROL}: {err.strerror}"
    return ""
