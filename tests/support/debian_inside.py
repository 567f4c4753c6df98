"""Run a command with the /usr and /etc of another system; this mount namespace is new and its own.

Arguments: that system's root directory, and the command.  The rest of the root file system is the
machine's.  A mount that is not shared would stay busy for all others as long as the command runs:
those that are not the machine's own are let go.
"""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.linux import mount
from devmapper.linux.mount import MountEntry, MountFlag, UmountFlag

_REPLACED: Final = (Path("/etc"), Path("/usr"))
_MACHINES: Final = (Path("/proc"), Path("/sys"), Path("/dev"))  # with all that is below
_PLACES: Final = (Path("/"), Path("/run"), Path("/tmp"), Path("/var"), Path("/home"), Path("/root"))
_MS_SLAVE: Final = 1 << 19  # linux/mount.h


def replace(root: Path) -> None:
    """Put the other system's directories over the machine's, for nobody else to see."""
    for folder in _REPLACED:
        holder = _holder(folder, mount.mountinfo())
        # What others mount and unmount there still arrives here, and nothing goes the other way
        mount.mount("none", holder.mount_point, None, flags=_MS_SLAVE)
        mount.mount(root / folder.name, folder, None, flags=MountFlag.BIND)


def let_go() -> None:
    """Unmount what an unmount by others would not reach."""
    entries = mount.mountinfo()
    shared = [entry for entry in entries if _is_shared(entry)]
    parents = {entry.mount_id: entry for entry in entries}
    for entry in reversed(entries):
        parent = parents.get(entry.parent_id)
        if not (
            _is_shared(entry)
            or parent is None
            or _is_shared(parent)  # others would lose it with us
            or entry.mount_point in (*_PLACES, *_REPLACED)
            or any(entry.mount_point.is_relative_to(place) for place in _MACHINES)
            or any(other.mount_point.is_relative_to(entry.mount_point) for other in shared)
        ):
            with suppress(OSError):  # it lies below another one
                mount.unmount(entry.mount_point, flags=UmountFlag.DETACH)


def _is_shared(entry: MountEntry) -> bool:
    return any(word.startswith(("shared:", "master:")) for word in entry.optional)


def _holder(path: Path, entries: list[MountEntry]) -> MountEntry:
    """The mount that *path* is in, the topmost where several lie on each other."""
    holders = [entry for entry in entries if path.is_relative_to(entry.mount_point)]
    deepest = max(len(entry.mount_point.parts) for entry in holders)
    return [entry for entry in holders if len(entry.mount_point.parts) == deepest][-1]


def main(root: Path, command: list[str]) -> None:
    replace(root)
    let_go()
    program = shutil.which(command[0])
    if program is None:
        sys.exit(f"{command[0]} is not there")
    os.execv(program, command)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
