"""The home of a graph as a private mount: what is mounted below it stays in this namespace.

Without that every layer would also be mounted in each container that starts, and its device would
stay busy after we have unmounted it.  moby binds the home onto itself from its driver's start to
its end; here that lasts from the first layer that is mounted until the graph is closed, or, if
layers stay mounted then, until the last one is not.
"""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from devmapper.deviceset.busy import retry_while_busy
from devmapper.linux import mount
from devmapper.linux.blockdev import DeviceNumber

Exclusive = Callable[[], AbstractContextManager[None]]


class PrivateHome:
    """The private mount of one graph's home, as one process uses it; any thread may call.

    A descriptor inside of it keeps other processes from undoing it.
    """

    def __init__(self, home: Path, exclusive: Exclusive) -> None:
        """*exclusive* keeps other processes from doing the same.

        A second bind would hide what is mounted below the first.
        """
        self._home = home
        self._exclusive = exclusive
        self._mutex = threading.Lock()
        self._pin: int | None = None

    def pin(self) -> None:
        """Make the home private, and keep it so until `release`.

        A home below which something is mounted already stays as it is: the bind would hide that.
        So are the layers of a Docker that was killed: 20.10 binds its data root instead.
        """
        with self._mutex:
            if self._pin is None:
                with self._exclusive():
                    if mount.is_mount_point(self._home) or not _has_mounts_below(self._home):
                        self._pin = _bind_and_open(self._home)

    def release(self, *, seconds: float = 0.0) -> None:
        """Let go of it, and undo it unless somebody needs it.  Idempotent."""
        with self._mutex:
            pin, self._pin = self._pin, None
        if pin is not None:
            os.close(pin)
        release_home(self._home, seconds=seconds)


def release_home(home: Path, *, seconds: float = 0.0) -> None:
    """Undo the private mount unless something is mounted below the home, or has a file of it open.

    Not under the graph's lock, whose own file is below the home.  The kernel decides: as long as
    another process has the home pinned, unmounting is EBUSY.
    """
    if not is_bound_onto_itself(home) or _has_mounts_below(home):
        return
    try:
        retry_while_busy(lambda: mount.unmount(home), seconds=seconds)
    except OSError as err:
        if err.errno not in (errno.EBUSY, errno.EINVAL):  # in use, or another one was faster
            raise


def _bind_and_open(home: Path) -> int:
    """A descriptor inside the private mount, which cannot be unmounted while it is open."""
    while True:
        mount.make_private(home)
        pin = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # `release_home` of another process may have come in between
        if _mount_id(pin) in [entry.mount_id for entry in _mounts_at(home)]:
            return pin
        os.close(pin)


def _mount_id(fd: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "mnt_id":
            return int(value)
    raise OSError(errno.ENODATA, "fdinfo has no mnt_id", str(fd))


def _mounts_at(home: Path) -> list[mount.MountEntry]:
    real = Path(os.path.realpath(home))
    return [entry for entry in mount.mountinfo() if entry.mount_point == real]


def _has_mounts_below(home: Path) -> bool:
    real = Path(os.path.realpath(home))
    return any(real in entry.mount_point.parents for entry in mount.mountinfo())


def is_bound_onto_itself(home: Path) -> bool:
    """Whether the mount at *home* is such a bind, and not a disk or a bind of the user's."""
    real = Path(os.path.realpath(home))
    above = [entry for entry in mount.mountinfo() if real.is_relative_to(entry.mount_point)]
    here = [entry for entry in above if entry.mount_point == real]
    around = [entry for entry in above if entry.mount_point != real]
    if not here:
        return False
    bind = here[-1]
    if not around:  # inside a chroot into a plain directory, whose own mount is not to be seen
        inode = os.stat(real.parent)
        outer_device = DeviceNumber(os.major(inode.st_dev), os.minor(inode.st_dev))
        return bind.device == outer_device and bind.root.endswith(str(real))
    outer = max(reversed(around), key=lambda entry: len(entry.mount_point.parts))
    own_root = Path(outer.root) / real.relative_to(outer.mount_point)
    return bind.device == outer.device and Path(bind.root) == own_root
