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
    daemon = subprocess.Popen([_PROGRAM], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for words in (["control", "--ping"], ["trigger", "--subsystem-match=block"], ["settle"]):
            subprocess.run(["udevadm", *words], check=True, timeout=_WAIT)
        yield
    finally:
        daemon.terminate()
        daemon.wait(_WAIT)
        # What libdevmapper looks at to know whether udevd runs
        (_RUNTIME / "control").unlink(missing_ok=True)
