"""udevd for the time of a test, where the machine belongs to the tests."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PROGRAM: Final = "/lib/systemd/systemd-udevd"
_RUNTIME: Final = Path("/run/udev")
_WAIT: Final = 60  # seconds


@contextmanager
def udevd() -> Iterator[None]:
    """A udevd that has settled.

    libdevmapper looks once in a process whether it is to work with udev: programs started inside
    do, the test itself need not.
    """
    _RUNTIME.mkdir(exist_ok=True)
    _run(_PROGRAM, "--daemon")  # returns when it listens
    try:
        _run("udevadm", "trigger", "--subsystem-match=block")
        _run("udevadm", "settle")
        yield
    finally:
        _run("udevadm", "control", "--exit")
        # What libdevmapper looks at to know whether udevd runs
        (_RUNTIME / "control").unlink(missing_ok=True)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=_WAIT)
