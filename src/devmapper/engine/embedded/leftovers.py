"""What an engine process that was killed leaves in the kernel, and clearing it.

When the process dies, its FUSE mount stays and answers ENOTCONN; loop devices on it stay attached
and fail all I/O; file systems on those stay mounted, with their journals aborted.  That equals
disks that were pulled: nothing of it can be written any more, so everything is let go of lazily.
The pool itself is at its last commit.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from devmapper.engine.embedded import freezing, runtime
from devmapper.linux import loop, mount

_NOTHING_THERE = frozenset({errno.ENXIO, errno.ENODEV, errno.ENOENT, errno.EINVAL})


class Cleared(NamedTuple):
    """What was found and let go of."""

    unmounted: tuple[Path, ...]
    detached: tuple[Path, ...]
    lingering: tuple[Path, ...]  # loop devices that go away when their last user ends
    export_unmounted: bool


def loop_devices(paths: runtime.Paths) -> list[Path]:
    """The loop devices on files of the pool's export, dead or alive."""
    below = f"{paths.export}/"
    return [node for node, backing in loop.attached_devices() if str(backing).startswith(below)]


def clear(paths: runtime.Paths) -> Cleared:
    """Let go of what a killed engine process left; called with the start lock held.

    The caller has made sure that no engine process of this pool runs.
    """
    unmounted: list[Path] = []
    detached: list[Path] = []
    lingering: list[Path] = []
    # The loop devices first: once their backing files are unmounted, sysfs does not name them
    for node in loop_devices(paths):
        unmounted += _abandon_mounts(node)
        match loop.detach(node, deferred=True):
            case loop.Detached.DEFERRED:
                lingering.append(node)
            case loop.Detached.GONE | loop.Detached.ALREADY:
                detached.append(node)
    export_unmounted = _unmount_export(paths)
    runtime.remove_directory(paths)
    return Cleared(tuple(unmounted), tuple(detached), tuple(lingering), export_unmounted)


def _abandon_mounts(node: Path) -> list[Path]:
    """Unmount lazily what stands on *node*, as far as this mount namespace shows it."""
    abandoned = []
    for point in reversed(freezing.mount_points(node)):
        # A frozen file system that nobody can reach any more would stay for ever
        with suppress(OSError):
            mount.thaw(point.path)
        if not point.own:
            continue
        try:
            mount.unmount(point.path, flags=mount.UmountFlag.DETACH)
        except OSError as err:
            if err.errno not in _NOTHING_THERE:
                raise
        else:
            abandoned.append(point.path)
    return abandoned


def _unmount_export(paths: runtime.Paths) -> bool:
    """Unmount dead exports; forced, which also ends requests that a half-dead process holds."""
    found = False
    while mount.is_mount_point(paths.export):
        flags = mount.UmountFlag.FORCE | mount.UmountFlag.DETACH
        mount.unmount(paths.export, flags=flags)
        found = True
    return found


def describe(cleared: Cleared) -> str:
    """One line for the log."""
    parts = [
        f"{len(cleared.unmounted)} file systems unmounted",
        f"{len(cleared.detached)} loop devices detached",
    ]
    if cleared.lingering:
        names = ", ".join(os.fspath(node) for node in cleared.lingering)
        parts.append(f"{names} still in use")
    return ", ".join(parts)
