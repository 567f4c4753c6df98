"""Extended attributes of a name in an open directory, and the one that is never carried.

Linux has no *at calls for them that every kernel knows, so names go through /proc/self/fd.
"""

import os
from errno import ENODATA, ENOENT, EOPNOTSUPP
from typing import Final

# A label belongs to a mount (`context=`), not to a layer: with it every file of two containers
# would differ, and a stream could relabel what it unpacks.
NEVER_CARRIED: Final = frozenset({"security.selinux"})


def path_of(name: str, dir_fd: int) -> str:
    return f"/proc/self/fd/{dir_fd}/{name}"


def list_xattrs(target: int | str, *, follow_symlinks: bool = True) -> list[str]:
    """The names of the attributes of a descriptor or path, sorted; none where there cannot be."""
    try:
        names = os.listxattr(target, follow_symlinks=follow_symlinks)
    except OSError as err:
        if err.errno == EOPNOTSUPP:
            return []
        raise
    return sorted(name for name in names if name not in NEVER_CARRIED) if names else names


def read_xattrs(name: str, *, dir_fd: int) -> dict[str, bytes]:
    """The attributes of *name* itself (a symbolic link is not followed), sorted by their names."""
    path = path_of(name, dir_fd)
    found = {}
    for key in list_xattrs(path, follow_symlinks=False):
        try:
            found[key] = os.getxattr(path, key, follow_symlinks=False)
        except OSError as err:
            if err.errno not in (ENODATA, ENOENT, EOPNOTSUPP):
                raise
    return found
