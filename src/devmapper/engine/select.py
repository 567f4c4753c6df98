"""Which engine serves a pool on this machine."""

from typing import Final, Literal

from devmapper.engine.port import Engine
from devmapper.errors import EnvironmentLacking

Preference = Literal["auto", "kernel", "embedded"]

_HINT: Final = "leave out --engine, or use --engine embedded"


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
            raise EnvironmentLacking(f"the kernel engine cannot be used: {lacking}", hint=_HINT)
    from devmapper.engine.embedded import requirements
    from devmapper.engine.embedded.client import EmbeddedEngine

    requirements.check()
    return EmbeddedEngine()


def kernel_lacks() -> str:
    """Why the kernel's device mapper cannot be used; empty if it can."""
    from devmapper.engine.kernel import requirements

    return requirements.lacking()
