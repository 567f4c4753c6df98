"""Devices of the kernel's device mapper: one operation a function, by name.

Errors are `OSError` with the errno of the ioctl; ENXIO: there is no device of that name.  Nothing
here knows what a target means.  With udev the nodes are udev's; without it they are made and
removed here, in /dev/mapper.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.linux import libdm, udev_cookie
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.libdm import DeviceState, Target, TaskKind, UdevFlag

_NODES: Final = Path("/dev/mapper")
_NO_FLAGS: Final = UdevFlag(0)
# As moby `devmapper.go` CreatePool: udev looks at no content of a pool
POOL_FLAGS: Final = (
    UdevFlag.DISABLE_SUBSYSTEM_RULES | UdevFlag.DISABLE_DISK_RULES | UdevFlag.DISABLE_OTHER_RULES
)


class Device(NamedTuple):
    """A device and the lines of its table, or of its status."""

    state: DeviceState
    targets: list[Target]


def node_of(name: str) -> Path:
    return _NODES / name


def create(
    name: str, targets: list[Target], *, flags: UdevFlag = _NO_FLAGS, read_only: bool = False
) -> Path:
    """Make a device and return its node; EBUSY if there is one of that name.

    On an error there is none.  With udev that has to be waited for: ETIMEDOUT, and no device.
    """
    with libdm.task(TaskKind.CREATE, name) as task:
        task.run()
    try:
        reload(name, targets, read_only=read_only)
        number = resume(name, flags=flags)
        node = node_of(name)
        if not libdm.udev_sync_support():
            _make_node(node, number)
    except BaseException as err:
        try:
            remove(name)
        except OSError as undo:
            err.add_note(f"{name!r} could not be removed again: {undo}")
        raise
    return node


def remove(name: str, *, deferred: bool = False) -> None:
    """Remove a device: EBUSY if it is in use; with *deferred* it then goes with its last user."""
    flags = UdevFlag.DISABLE_LIBRARY_FALLBACK if deferred else _NO_FLAGS
    with udev_cookie.cookie(name) as cookie, libdm.task(TaskKind.REMOVE, name) as task:
        task.set_cookie(cookie, flags)
        if deferred:
            task.defer()
        task.run()
    if not libdm.udev_sync_support():
        remove_stale_node(name)


def remove_stale_node(name: str) -> None:
    """Remove the node of a device that is gone; nobody else does where udev does not run."""
    libdm.update_nodes()
    if find(name) is None:
        with suppress(FileNotFoundError):
            node_of(name).unlink()


def find(name: str) -> DeviceState | None:
    """What the device is doing; None if there is none."""
    with libdm.task(TaskKind.INFO, name) as task:
        try:
            task.run()
        except OSError as err:
            if err.errno == errno.ENXIO:
                return None
            raise
        return task.state()


def find_table(name: str) -> Device | None:
    """The device and its table; None if there is none."""
    return _read(TaskKind.TABLE, name, no_flush=False)


def find_status(name: str, *, no_flush: bool) -> Device | None:
    """The device and its targets' status; without *no_flush* a thin pool commits first."""
    return _read(TaskKind.STATUS, name, no_flush=no_flush)


def reload(name: str, targets: list[Target], *, read_only: bool = False) -> None:
    """Load a table, which `resume` makes the live one."""
    with libdm.task(TaskKind.RELOAD, name) as task:
        for target in targets:
            task.add_target(target)
        if read_only:
            task.set_read_only()
        task.run()


def suspend(name: str, *, no_flush: bool = False, skip_lockfs: bool = False) -> None:
    """Freeze the file system, drain the I/O; EBUSY if somebody has frozen the file system.

    *no_flush*: I/O that waits for space goes on waiting.  *skip_lockfs*: nothing is frozen.
    """
    with libdm.task(TaskKind.SUSPEND, name) as task:
        if no_flush:
            task.no_flush()
        if skip_lockfs:
            task.skip_lockfs()
        task.run()


def resume(name: str, *, flags: UdevFlag = _NO_FLAGS) -> DeviceNumber:
    """Make the table that was loaded the live one, let I/O go on; returns the device's number."""
    with udev_cookie.cookie(name) as cookie, libdm.task(TaskKind.RESUME, name) as task:
        task.set_cookie(cookie, flags)
        task.run()
        state = task.state()
    if state is None:
        raise OSError(errno.ENXIO, "device is gone", name)
    return state.number


@contextmanager
def suspended(name: str, *, no_flush: bool = False, skip_lockfs: bool = False) -> Iterator[None]:
    """Suspended for the duration; a resume that fails is raised above all else."""
    suspend(name, no_flush=no_flush, skip_lockfs=skip_lockfs)
    try:
        yield
    finally:
        resume(name)


def message(name: str, text: str) -> None:
    """Send a message to the target at the device's begin."""
    with libdm.task(TaskKind.MESSAGE, name) as task:
        task.set_message(text)
        task.run()


def name_of(number: DeviceNumber) -> str:
    """The name of a device by its number; `FileNotFoundError` if it is not device mapper's."""
    path = Path(f"/sys/dev/block/{number}/dm/name")
    return path.read_text(encoding="utf-8").removesuffix("\n")


def is_suspended(number: DeviceNumber) -> bool:
    path = Path(f"/sys/dev/block/{number}/dm/suspended")
    return path.read_text(encoding="ascii").strip() == "1"


def stacked_on(number: DeviceNumber) -> list[str]:
    """Names of the devices of device mapper that stand on the device, sorted."""
    found = []
    for entry in _listdir(f"/sys/dev/block/{number}/holders"):
        with suppress(FileNotFoundError):  # no device mapper's, or gone meanwhile
            path = Path(f"/sys/block/{entry}/dm/name")
            found.append(path.read_text(encoding="utf-8").removesuffix("\n"))
    return sorted(found)


def node_of_number(number: DeviceNumber) -> Path:
    """The usual node of any block device: `/dev/mapper/NAME`, or `/dev/` and the kernel's name."""
    try:
        return node_of(name_of(number))
    except FileNotFoundError:
        link = Path(f"/sys/dev/block/{number}").readlink()
        return Path("/dev") / link.name.replace("!", "/")


def _read(kind: TaskKind, name: str, *, no_flush: bool) -> Device | None:
    with libdm.task(kind, name) as task:
        if no_flush:
            task.no_flush()
        try:
            task.run()
        except OSError as err:
            if err.errno == errno.ENXIO:
                return None
            raise
        state = task.state()
        return None if state is None else Device(state, task.targets())


def _make_node(node: Path, number: DeviceNumber) -> None:
    """The library has often made it by now; it never does where it believes that udev would."""
    libdm.update_nodes()
    wanted = os.makedev(*number)
    with suppress(FileNotFoundError):
        found = node.lstat()
        if stat.S_ISBLK(found.st_mode) and found.st_rdev == wanted:
            return
        node.unlink()  # left by a device of that name that is gone
    node.parent.mkdir(mode=0o755, exist_ok=True)
    os.mknod(node, stat.S_IFBLK | 0o600, wanted)


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []
