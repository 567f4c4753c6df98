"""Mount options: which are flags of mount(2), and which the file system reads itself."""

import os
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from devmapper.errors import UsageError
from devmapper.linux.mount import MountFlag

# Option -> (flags it sets, flags it clears), as mount(8) documents them
_FLAGS: Final[Mapping[str, tuple[MountFlag, MountFlag]]] = {
    "defaults": (MountFlag(0), MountFlag(0)),
    "ro": (MountFlag.RDONLY, MountFlag(0)),
    "rw": (MountFlag(0), MountFlag.RDONLY),
    "nosuid": (MountFlag.NOSUID, MountFlag(0)),
    "suid": (MountFlag(0), MountFlag.NOSUID),
    "nodev": (MountFlag.NODEV, MountFlag(0)),
    "dev": (MountFlag(0), MountFlag.NODEV),
    "noexec": (MountFlag.NOEXEC, MountFlag(0)),
    "exec": (MountFlag(0), MountFlag.NOEXEC),
    "sync": (MountFlag.SYNCHRONOUS, MountFlag(0)),
    "async": (MountFlag(0), MountFlag.SYNCHRONOUS),
    "dirsync": (MountFlag.DIRSYNC, MountFlag(0)),
    "mand": (MountFlag.MANDLOCK, MountFlag(0)),
    "nomand": (MountFlag(0), MountFlag.MANDLOCK),
    "noatime": (MountFlag.NOATIME, MountFlag(0)),
    "atime": (MountFlag(0), MountFlag.NOATIME),
    "nodiratime": (MountFlag.NODIRATIME, MountFlag(0)),
    "diratime": (MountFlag(0), MountFlag.NODIRATIME),
    "relatime": (MountFlag.RELATIME, MountFlag(0)),
    "norelatime": (MountFlag(0), MountFlag.RELATIME),
    "strictatime": (MountFlag.STRICTATIME, MountFlag(0)),
    "nostrictatime": (MountFlag(0), MountFlag.STRICTATIME),
    "lazytime": (MountFlag.LAZYTIME, MountFlag(0)),
    "nolazytime": (MountFlag(0), MountFlag.LAZYTIME),
}

_MAX_DATA: Final = 4096  # a page, with the NUL at its end


class MountOptions(NamedTuple):
    """The two arguments of mount(2)."""

    flags: MountFlag
    data: str


def mount_options(fs_type: str, chosen: Iterable[str], label: str) -> MountOptions:
    """Combine what a layer's mount needs, in moby's order: nouuid, dm.mountopt, the label.

    Every snapshot of an xfs has the UUID of its origin, which xfs refuses to mount twice without
    `nouuid`.  Flags were data in moby 1.7, so that `noatime` made the mount fail.
    `UsageError` for a label that is none, and for more than mount(2) takes: it would cut it off.
    """
    check_label(label)
    flags = MountFlag(0)
    data = ["nouuid"] if fs_type == "xfs" else []
    for option in ",".join(chosen).split(","):
        if option in _FLAGS:
            sets, clears = _FLAGS[option]
            flags = (flags | sets) & ~clears
        elif option:
            data.append(option)
    if label:
        data.append(f'context="{label}"')
    whole = ",".join(data)
    if len(os.fsencode(whole)) >= _MAX_DATA:
        raise UsageError(
            f"mount options have {len(os.fsencode(whole))} bytes, expected less than {_MAX_DATA}"
        )
    return MountOptions(flags, whole)


def check_label(label: str) -> None:
    """Refuse a label that would end its quotes and go on as other mount options.

    Commas (`s0:c1,c2`) are what the quotes are for; the kernel knows no escapes inside of them.
    """
    if '"' in label or not label.isprintable():
        raise UsageError(
            f"mount label {label!r} is no SELinux label",
            hint="such as system_u:object_r:container_file_t:s0:c1,c2",
        )
