"""What a directory tree or a tar archive holds, in a form that can be compared.

Archives are read with the standard library, so that they are a second opinion on our own reader.
"""

import hashlib
import os
import stat
import tarfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, NamedTuple

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_TAR_KINDS = {
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "fifo",
}
_XATTR = "SCHILY.xattr."


class Node(NamedTuple):
    kind: str
    mode: int
    uid: int
    gid: int
    mtime: int  # whole seconds
    content: str = ""  # SHA-256
    target: str = ""
    rdev: tuple[int, int] = (0, 0)
    links: tuple[str, ...] = ()  # all names of a file that has several
    xattrs: tuple[tuple[str, bytes], ...] = ()


Tree = dict[str, Node]  # by the path below the root, which itself is left out


def _hash(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _xattrs_of(path: str) -> tuple[tuple[str, bytes], ...]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:
        return ()
    return tuple(
        (name, os.getxattr(path, name, follow_symlinks=False))
        for name in sorted(names)
        if name != "security.selinux"
    )


def _node_of(path: str, status: os.stat_result) -> Node:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    content = ""
    if kind == "file":
        with open(path, "rb") as file:
            content = _hash(file)
    is_device = kind in ("character device", "block device")
    return Node(
        kind,
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns // 1_000_000_000,
        content,
        os.readlink(path) if kind == "symlink" else "",
        (os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
        xattrs=_xattrs_of(path),
    )


def snapshot_tree(path: Path) -> Tree:
    """Everything below *path*, not crossing symbolic links."""
    tree: Tree = {}
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(path, prefix)) as entries:
            for entry in entries:
                name = os.path.join(prefix, entry.name)
                status = entry.stat(follow_symlinks=False)
                tree[name] = _node_of(entry.path, status)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(name)
                elif status.st_nlink > 1:
                    groups[status.st_dev, status.st_ino].append(name)
    _join(tree, groups.values())
    return tree


def tree_of_tar(path: Path) -> Tree:
    """What an archive of a whole tree holds; comparable with `snapshot_tree` of that tree."""
    tree: Tree = {}
    first: dict[str, str] = {}
    groups: dict[str, list[str]] = defaultdict(list)
    with tarfile.open(path) as archive:
        for member in archive:
            name = os.path.normpath(member.name).lstrip("/")
            if name == ".":
                continue
            if member.islnk():
                origin = os.path.normpath(member.linkname).lstrip("/")
                first[name] = first.get(origin, origin)
                groups[first[name]].append(name)
                tree[name] = tree[origin]
                continue
            tree[name] = _node_of_member(archive, member)
    _join(tree, [[origin, *names] for origin, names in groups.items()])
    return tree


def _node_of_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Node:
    kind = _TAR_KINDS.get(member.type, "file")
    file = archive.extractfile(member) if kind == "file" else None
    is_device = kind in ("character device", "block device")
    xattrs = {
        # GNU tar's spelling of what a keyword cannot hold
        key.removeprefix(_XATTR).replace("%3D", "=").replace("%25", "%"): value.encode(
            "utf-8", "surrogateescape"
        )
        for key, value in member.pax_headers.items()
        if key.startswith(_XATTR)
    }
    return Node(
        kind,
        member.mode & 0o7777,
        member.uid,
        member.gid,
        int(member.mtime // 1),
        _hash(file) if file is not None else "",
        member.linkname if kind == "symlink" else "",
        (member.devmajor, member.devminor) if is_device else (0, 0),
        xattrs=tuple(sorted(xattrs.items())),
    )


def _unquote(key: str) -> str:
    """GNU tar's spelling of what a keyword cannot hold."""
    return key.replace("%3D", "=").replace("%25", "%")


def _join(tree: Tree, groups: Collection[list[str]]) -> None:
    for names in groups:
        if len(names) > 1:
            for name in names:
                tree[name] = tree[name]._replace(links=tuple(sorted(names)))


def assert_trees_equal(
    a: Mapping[str, Node] | Path, b: Mapping[str, Node] | Path, *, ignore: Collection[str] = ()
) -> None:
    """Fail with the first differences named.  *ignore* holds names of fields of `Node`."""
    left = snapshot_tree(a) if isinstance(a, Path) else a
    right = snapshot_tree(b) if isinstance(b, Path) else b
    wrong = [f"only in the first: {name!r}" for name in sorted(left.keys() - right.keys())]
    wrong += [f"only in the second: {name!r}" for name in sorted(right.keys() - left.keys())]
    fields = [field for field in Node._fields if field not in ignore]
    for name in sorted(left.keys() & right.keys()):
        for field in fields:
            one, other = getattr(left[name], field), getattr(right[name], field)
            if one != other:
                wrong.append(f"{name!r}: {field} is {one!r} in the first, {other!r} in the second")
    if wrong:
        more = f"\n… and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise AssertionError("trees differ:\n" + "\n".join(wrong[:20]) + more)
