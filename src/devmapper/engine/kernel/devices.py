"""Device-mapper devices by name: made, loaded, resumed, suspended, removed, asked.

Everything that ends in an event for udev waits until udev is done with it, without holding any
lock of the library.  moby leaves the library its own fallback for nodes (flags 0); here
DISABLE_LIBRARY_FALLBACK goes with every cookie, because the library would make nodes for the events
of other threads while udev is still at it.  Missing nodes are made here, after the wait.

Errors are `OSError` with the errno of the ioctl, and `EngineError` where udev does not answer.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.errors import DevmapperError
from devmapper.linux import dmnode, libdm, udev_cookie
from devmapper.linux.libdm import DeviceState, Target, TaskKind, UdevFlag

_OWN_NODES: Final = UdevFlag.DISABLE_LIBRARY_FALLBACK
# moby devmapper.go CreatePool: nobody shall probe what the pool's device holds
POOL_FLAGS: Final = (
    UdevFlag.DISABLE_SUBSYSTEM_RULES | UdevFlag.DISABLE_DISK_RULES | UdevFlag.DISABLE_OTHER_RULES
)
THIN_FLAGS: Final = UdevFlag(0)


class Found(NamedTuple):
    """A device and its live table; no target if it has none."""

    state: DeviceState
    target: Target | None


def find(name: str) -> Found | None:
    """The device and its table; None if there is none by that name."""
    return _ask(TaskKind.TABLE, name)


def find_state(name: str) -> DeviceState | None:
    with libdm.task(TaskKind.INFO, name) as task:
        task.run()
        return task.state()


def status(name: str, *, flush: bool) -> Found | None:
    """The device and its status line; with *flush* a pool commits first."""
    return _ask(TaskKind.STATUS, name, flush=flush)


def message(name: str, text: str) -> None:
    """Send a message to the target of a device."""
    with libdm.task(TaskKind.MESSAGE, name) as task:
        task.set_message(text)
        task.run()


def create(name: str, target: Target, flags: UdevFlag) -> Path | None:
    """Make an active device and return its node; None if the name is taken.

    On an error, and where udev does not answer, there is no device afterwards.
    """
    try:
        with libdm.task(TaskKind.CREATE, name) as task:
            task.run()
    except OSError as err:
        if err.errno == errno.EBUSY:
            return None
        raise
    try:
        load(name, target)
        return resume(name, flags)
    except BaseException as err:
        _undo_create(name, err)
        raise


def load(name: str, target: Target) -> None:
    """Load a table that becomes live with the next `resume`."""
    try:
        with libdm.task(TaskKind.RELOAD, name) as task:
            task.add_target(target)
            task.run()
    except OSError as err:
        err.add_note(f"table: {target.start} {target.length} {target.kind} {target.params}")
        raise


def resume(name: str, flags: UdevFlag) -> Path:
    """Take the loaded table, if there is one, and let I/O go on; returns the node."""
    with (
        udev_cookie.cookie(f"resuming device {name!r}") as key,
        libdm.task(TaskKind.RESUME, name) as task,
    ):
        if key:
            task.set_cookie(key, flags | _OWN_NODES)
        task.run()
        state = task.state()
    libdm.update_nodes()
    if state is None:
        raise OSError(errno.ENXIO, "device has gone", name)
    return dmnode.ensure(name, state.number)


def suspend(name: str) -> DeviceState | None:
    """Freeze the file system on it, let I/O under way end, hold what comes; None if not there.

    A device that is suspended already stays so.
    """
    try:
        with libdm.task(TaskKind.SUSPEND, name) as task:
            task.run()
            return task.state()
    except OSError as err:
        if err.errno == errno.ENXIO:
            return None
        raise


def remove(name: str) -> None:
    """Remove a device; EBUSY if it is in use, ENXIO if there is none."""
    with _removal(name) as task:
        task.run()
    libdm.update_nodes()


def remove_deferred(name: str, state: DeviceState) -> bool:
    """Remove a device, or have it go with its last user; True if it is gone already."""
    with _removal(name) as task:
        task.defer()
        task.run()
        after = task.state()
    libdm.update_nodes()
    if after is None or not after.deferred_remove:
        return True
    dmnode.ensure(name, state.number)  # without udev the library takes the node away at once
    return False


@contextmanager
def _removal(name: str) -> Iterator[libdm.Task]:
    with (
        udev_cookie.cookie(f"removing device {name!r}") as key,
        libdm.task(TaskKind.REMOVE, name) as task,
    ):
        if key:
            task.set_cookie(key, _OWN_NODES)
        yield task


def _ask(kind: TaskKind, name: str, *, flush: bool = True) -> Found | None:
    with libdm.task(kind, name) as task:
        if not flush:
            task.no_flush()
        try:
            task.run()
        except OSError as err:
            if err.errno == errno.ENXIO:
                return None
            raise
        state = task.state()
        targets = task.targets()
    return None if state is None else Found(state, targets[0] if targets else None)


def _undo_create(name: str, error: BaseException) -> None:
    try:
        with libdm.task(TaskKind.REMOVE, name) as task:
            task.run()
        libdm.update_nodes()
        with suppress(OSError):
            dmnode.remove(name)
    except (DevmapperError, OSError) as err:
        error.add_note(f"device {name!r} stays: {err}")
