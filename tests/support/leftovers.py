"""Removes what killed tests left behind: `python -m tests.support.leftovers`.

Only what is recognisably ours is touched: engines whose runtime base is a folder that the tests
made, `/run/dmt-<pid>-*`, the mounts, loop devices and processes below it, and the folders of guests
in User Mode Linux.
"""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

from devmapper.engine.embedded import leftovers, runtime
from devmapper.linux import loop, mount
from tests.uml import guest

BASES = "dmt-*"


def pools_of(base: Path) -> list[runtime.Paths]:
    """The runtime directories below *base*."""
    if not base.is_dir():
        return []
    return [
        runtime.Paths(Path(entry.path))
        for entry in os.scandir(os.path.realpath(base))
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
    ]


def remaining(base: Path) -> list[str]:
    """What engines of *base* have left in the kernel or still run, in words."""
    root = os.path.realpath(base)
    found = [
        f"{node} on {backing}"
        for node, backing in loop.attached_devices()
        if str(backing).startswith(root + "/")
    ]
    found += [
        f"mount at {entry.mount_point}"
        for entry in mount.mountinfo()
        if str(entry.mount_point).startswith(root + "/")
    ]
    for paths in pools_of(base):
        identity = runtime.read_pid(paths)
        if identity is not None and identity.alive():
            found.append(f"engine process {identity.pid} of {paths.directory}")
    return found


def assert_nothing_left(base: Path) -> None:
    """Fail with what is left; called after everything was stopped."""
    left = remaining(base)
    assert left == [], f"left behind: {left}"


def clear(base: Path) -> None:
    """End engine processes of *base* and let go of all they had."""
    for paths in pools_of(base):
        identity = runtime.read_pid(paths)
        if identity is not None:
            identity.send_signal(signal.SIGKILL)
            identity.wait(60)
        try:
            leftovers.clear(paths)
        except OSError as err:
            if err.errno != errno.EBUSY:
                raise
            print(f"{paths.directory}: {err}", file=sys.stderr)


def main() -> None:
    guest.sweep()
    for base in sorted(Path("/run").glob(BASES)):
        # A base in use by tests that run right now is not a leftover
        if is_in_use(base):
            print(f"{base}: in use, left alone")
            continue
        clear(base)
        shutil.rmtree(base)
        print(f"{base}: removed")


def is_in_use(base: Path) -> bool:
    """Whether the test process that made *base* still runs: its name is `dmt-<pid>-…`."""
    pid = base.name.split("-")[1]
    return pid.isdigit() and Path("/proc", pid).exists()


if __name__ == "__main__":
    main()
