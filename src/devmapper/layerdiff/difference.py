"""Whether two inodes of one name differ, with the rules of Docker's `pkg/archive`.

Deliberately stronger than Docker where it overlooks a difference: see docs/internals/layer-diff.md.
"""

import os
import stat
from typing import Final

from devmapper.layerdiff.attributes import read_xattrs
from devmapper.layerdiff.descent import Cursor

_SECOND: Final = 1_000_000_000


def status_of(name: str, cursor: Cursor) -> os.stat_result | None:
    """The lstat of *name* in the directory of *cursor*; None if it is not there."""
    try:
        return os.stat(name, dir_fd=cursor.fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def differs(
    name: str, new: os.stat_result, old: os.stat_result, *, new_in: Cursor, old_in: Cursor
) -> bool:
    """Whether *name*, with status *new* in one directory and *old* in the other, was modified."""
    if _status_differs(new, old):
        return True
    if stat.S_ISLNK(new.st_mode):
        target = os.readlink(name, dir_fd=new_in.fd)
        if target != os.readlink(name, dir_fd=old_in.fd):
            return True
    return read_xattrs(name, dir_fd=new_in.fd) != read_xattrs(name, dir_fd=old_in.fd)


def _status_differs(new: os.stat_result, old: os.stat_result) -> bool:
    if (new.st_mode, new.st_uid, new.st_gid, new.st_rdev) != (
        old.st_mode,
        old.st_uid,
        old.st_gid,
        old.st_rdev,
    ):
        return True
    if stat.S_ISDIR(new.st_mode):
        return False
    return new.st_size != old.st_size or not _same_time(new.st_mtime_ns, old.st_mtime_ns)


def _same_time(one: int, other: int) -> bool:
    """Equal, or equal to the second where one side came through an archive without fractions."""
    if one == other:
        return True
    same_second = one // _SECOND == other // _SECOND
    return same_second and (one % _SECOND == 0 or other % _SECOND == 0)
