"""What the kernel engine needs of the machine, found out by asking for it once."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.linux.dmnode import DIRECTORY

_CONTROL: Final = DIRECTORY / "control"
_TARGETS: Final = ("thin-pool", "thin")
_MISC_MAJOR: Final = 10
_DRIVER: Final = "device-mapper"


def lacking() -> str:
    """Why the kernel's device mapper cannot be used; empty if it can.

    A node that is missing in /dev is made; the target's module is loaded by asking for it.  Where
    there is no device mapper, which is asked first, the library is not even looked for.
    """
    if os.geteuid() != 0:
        return "only root can use device mapper"
    try:
        _open_control()
    except OSError as err:
        module = "" if _minor() is not None else " (the kernel module dm_mod is not loaded)"
        return f"{_CONTROL}: {err.strerror}{module}"
    return _library_or_targets_lack()


def _open_control() -> None:
    try:
        os.close(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        minor = _minor()
        if minor is None:
            raise
        # A container whose /dev nobody filled
        _CONTROL.parent.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            os.mknod(_CONTROL, stat.S_IFCHR | 0o600, os.makedev(_MISC_MAJOR, minor))
        os.close(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC))


def _minor() -> int | None:
    """The control device's number, where the driver is loaded."""
    with suppress(OSError):
        for line in Path("/proc/misc").read_text(encoding="ascii").splitlines():
            minor, _, name = line.strip().partition(" ")
            if name == _DRIVER:
                return int(minor)
    return None


def _library_or_targets_lack() -> str:
    try:
        for target in _TARGETS:
            if not _has_target(target):
                return f"the kernel has no target {target!r} (module dm_thin_pool)"
    except OSError as err:
        return f"{err.filename or _DRIVER}: {err.strerror}"
    return ""


def _has_target(name: str) -> bool:
    from devmapper.linux import libdm
    from devmapper.linux.libdm import TaskKind

    try:
        with libdm.task(TaskKind.TARGET_VERSION, name) as task:
            task.run()
            return True
    except OSError as err:
        if err.errno == errno.EINVAL:
            return False
        if err.errno != errno.ENOTTY:
            raise
    # Before Linux 5.5 there is the list only, and a target is in it once its module is loaded
    with libdm.task(TaskKind.LIST_VERSIONS) as task:
        task.run()
        return name in task.target_versions()
