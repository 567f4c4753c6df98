"""A directory tree and a tar of it, brought into one form that can be compared to the byte."""

import hashlib
import os
import stat
import tarfile
from pathlib import Path
from typing import NamedTuple

_TYPES = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


class Inode(NamedTuple):
    """Everything of one name that a tar carries; names of one inode are equal in *names*."""

    mode: int  # with its type
    uid: int
    gid: int
    mtime: int  # seconds
    size: int
    digest: str
    target: str
    device: tuple[int, int]
    names: tuple[str, ...]


def of_tree(root: Path) -> dict[str, Inode]:
    """Every name below *root*; nothing is followed."""
    found: dict[str, os.stat_result] = {}
    names: dict[int, list[str]] = {}
    for directory, subdirectories, files in os.walk(root):
        for name in subdirectories + files:
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, root)
            status = os.lstat(path)
            found[relative] = status
            if not stat.S_ISDIR(status.st_mode):
                names.setdefault(status.st_ino, []).append(relative)
    return {
        name: _inode(root / name, status, tuple(sorted(names.get(status.st_ino, [name]))))
        for name, status in found.items()
    }


def _inode(path: Path, status: os.stat_result, names: tuple[str, ...]) -> Inode:
    kind = stat.S_IFMT(status.st_mode)
    regular = kind == stat.S_IFREG
    node = kind in (stat.S_IFCHR, stat.S_IFBLK)
    return Inode(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        int(status.st_mtime_ns // 10**9),
        status.st_size if regular else 0,
        hashlib.sha256(path.read_bytes()).hexdigest() if regular else "",
        os.readlink(path) if kind == stat.S_IFLNK else "",
        (os.major(status.st_rdev), os.minor(status.st_rdev)) if node else (0, 0),
        names,
    )


def of_tar(path: Path) -> dict[str, Inode]:
    """Every entry of a tar; a hard link is resolved to what it links to."""
    found: dict[str, Inode] = {}
    links: dict[str, list[str]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = _relative(member.name)
            if member.islnk():
                links.setdefault(_relative(member.linkname), []).append(name)
                continue
            content = archive.extractfile(member) if member.isreg() else None
            found[name] = Inode(
                _TYPES[member.type] | member.mode,
                member.uid,
                member.gid,
                int(member.mtime),
                member.size if member.isreg() else 0,
                hashlib.sha256(content.read()).hexdigest() if content else "",
                member.linkname if member.issym() else "",
                (member.devmajor, member.devminor) if member.ischr() or member.isblk() else (0, 0),
                (name,),
            )
    for target, others in links.items():
        inode = found[target]._replace(names=tuple(sorted([target, *others])))
        found.update(dict.fromkeys(inode.names, inode))
    return found


def _relative(name: str) -> str:
    """`docker export` says `bin`, `docker cp` `./bin` or `/bin`."""
    return name.strip("/").removeprefix("./")
