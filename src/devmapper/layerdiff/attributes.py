"""What an inode is, besides its content: owner, mode, times, extended attributes.

Linux has no *at calls for extended attributes that every kernel knows, so names in an open
directory go through /proc/self/fd.
"""

import logging
import os
import stat
from errno import ENODATA, ENOENT, EOPNOTSUPP, EPERM
from typing import Final

from devmapper.layerdiff import tarformat
from devmapper.layerdiff.tarformat import Entry

log = logging.getLogger(__name__)

# A label belongs to a mount (`context=`), not to a layer: with it every file of two containers
# would differ, and a stream could relabel what it unpacks.
NEVER_CARRIED: Final = frozenset({"security.selinux"})

_INHERITED: Final = frozenset({"system.posix_acl_access", "system.posix_acl_default"})
_TYPES: Final = {
    stat.S_IFREG: tarformat.REGULAR,
    stat.S_IFLNK: tarformat.SYMLINK,
    stat.S_IFCHR: tarformat.CHARACTER,
    stat.S_IFBLK: tarformat.BLOCK_DEVICE,
    stat.S_IFDIR: tarformat.DIRECTORY,
    stat.S_IFIFO: tarformat.FIFO,
}


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


def describe(path: str, name: str, status: os.stat_result, *, dir_fd: int) -> Entry | None:
    """The inode *name*, to be called *path* in an archive; None for a socket."""
    kind = _TYPES.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return None
    is_device = kind in (tarformat.CHARACTER, tarformat.BLOCK_DEVICE)
    return Entry(
        path + "/" if kind == tarformat.DIRECTORY else path,
        kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind == tarformat.REGULAR else 0,
        mtime_ns=status.st_mtime_ns,
        link=os.readlink(name, dir_fd=dir_fd) if kind == tarformat.SYMLINK else "",
        dev_major=os.major(status.st_rdev) if is_device else 0,
        dev_minor=os.minor(status.st_rdev) if is_device else 0,
        xattrs=read_xattrs(name, dir_fd=dir_fd),
    )


class AttributeWriter:
    """Gives inodes what an entry says.  What the file system refuses is warned of once per name."""

    def __init__(self) -> None:
        self._is_root = os.geteuid() == 0
        self._refused: set[str] = set()

    def allowed_mode(self, entry: Entry) -> int:
        """Without the right to give a file away, its set-id bits would be those of ourselves."""
        if self._is_root or (entry.uid, entry.gid) == (os.geteuid(), os.getegid()):
            return entry.mode
        return entry.mode & ~(stat.S_ISUID | stat.S_ISGID)

    def set(self, entry: Entry, target: int | str, *, is_new: bool = True) -> None:
        """Set all on *target*, a descriptor or its path in /proc/self/fd.

        Owner first, which clears set-id bits and capabilities; times last.
        """
        if self._is_root:
            os.chown(target, entry.uid, entry.gid)
        self._set_xattrs(entry, target, is_new=is_new)
        if entry.type != tarformat.SYMLINK:
            os.chmod(target, self.allowed_mode(entry))  # noqa: PTH101
        os.utime(target, ns=(entry.mtime_ns, entry.mtime_ns))

    def _set_xattrs(self, entry: Entry, target: int | str, *, is_new: bool) -> None:
        for key in list_xattrs(target):
            if key in entry.xattrs:
                continue
            if entry.complete_xattrs or (is_new and key in _INHERITED):
                os.removexattr(target, key)
        for key, value in entry.xattrs.items():
            if key in NEVER_CARRIED:
                continue
            try:
                os.setxattr(target, key, value)
            except OSError as err:
                if err.errno not in (EOPNOTSUPP, EPERM):
                    raise
                if key not in self._refused:
                    self._refused.add(key)
                    log.warning("%r: cannot set %r here: %s", entry.name, key, err.strerror)
