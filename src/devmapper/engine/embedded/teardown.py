"""Takes down what stands on the devices of a pool: a child of the engine process on SIGTERM.

    python -m devmapper.engine.embedded.teardown <pool> [--force]

Unmounts the file systems on its loop devices and deactivates the devices.  What is busy stays, is
named on standard error, and makes the exit status 1.  With --force mounts are detached lazily and
devices go away when their last user closes them.
"""

import sys
from typing import Final

from devmapper.engine.embedded import freezing, runtime
from devmapper.engine.embedded.client import EmbeddedEngine, EmbeddedPoolClient
from devmapper.engine.port import DeviceInfo
from devmapper.errors import DevmapperError
from devmapper.linux import mount, process
from devmapper.linux.holders import holders

_SYNC_SECONDS: Final = 30.0


def take_down(pool: EmbeddedPoolClient, *, force: bool) -> list[str]:
    """Deactivate all devices of *pool*; returns what could not be done, in words."""
    problems = []
    for device in pool.devices():
        try:
            _unmount(device, force=force)
            pool.deactivate(device.name, deferred=force)
        except DevmapperError as err:
            problems.append(str(err))
        except OSError as err:
            uses = ", ".join(holders(device.path)) or "nobody that can be seen"
            problems.append(f"device {device.name!r}: {err}; held by {uses}")
    return problems


def _unmount(device: DeviceInfo, *, force: bool) -> None:
    if device.nbd is not None:
        return  # whoever has mounted it is at the other end of a socket
    for point in reversed(freezing.mount_points(device.path)):
        if not point.own:
            continue
        if force:
            # Whoever has files open will find their disk gone; what they wrote must not be
            process.run(["sync", "--file-system", str(point.path)], timeout=_SYNC_SECONDS)
            mount.unmount(point.path, flags=mount.UmountFlag.DETACH)
        else:
            mount.unmount(point.path)


def main(argv: list[str]) -> int:
    name, *options = argv
    pool = EmbeddedEngine().find_pool(runtime.check_name(name, "pool"))
    if pool is None:
        return 0
    problems = take_down(pool, force="--force" in options)
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
