"""What differs between two directory trees, with the rules of Docker's `pkg/archive`.

Deliberately stronger than Docker where it overlooks a difference: see docs/internals/layer-diff.md.
What is known to be unchanged is not looked at (`unchanged.changed_inodes`): the walk then lists the
directories of the new tree, and asks of the rest no more than where it was changed.
Neither tree is written to; nothing is locked, so the caller keeps them still.
"""

import os
import stat
from collections.abc import Container, Iterable
from contextlib import ExitStack
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.layerdiff.attributes import read_xattrs
from devmapper.layerdiff.descent import Cursor

_SECOND: Final = 1_000_000_000


class _All(Container[int]):
    def __contains__(self, _: object) -> bool:
        return True


_ALL: Final = _All()


class Kind(IntEnum):
    """The numbers are Docker's, on its wire too."""

    MODIFY = 0
    ADD = 1
    DELETE = 2


class Change(NamedTuple):
    """One difference; *path* is absolute inside the layer, undecodable bytes as surrogates."""

    path: str
    kind: Kind

    @property
    def parts(self) -> list[str]:
        return self.path[1:].split("/")


def sort_key(change: Change) -> bytes:
    """Docker's order: by the bytes of the path, so that a directory precedes what is in it."""
    return os.fsencode(change.path)


def changes(
    new_root: Path, old_root: Path | None, *, suspects: Container[int] = _ALL
) -> list[Change]:
    """The changes that lead from *old_root* (None: an empty tree) to *new_root*, sorted.

    A directory in which something changed is listed as modified, a deleted directory is one entry,
    an added one is listed with all that it holds.  The root itself is never listed.

    *suspects* are the inode numbers that may mean something else in each tree; what has any other
    number in both is the same, and a directory has the same names for the same inodes.
    """
    with ExitStack() as stack:
        new = stack.enter_context(Cursor(new_root))
        old = stack.enter_context(Cursor(old_root)) if old_root is not None else None
        found = _Comparison(new, old, suspects).run()
    found.sort(key=sort_key)
    return found


class _Subdirectory(NamedTuple):
    name: str
    in_both: bool
    listed: bool
    same: bool  # the same names for the same inodes in both


class _Verdict(NamedTuple):
    """On one name: the change that it is, if it is any."""

    kind: Kind | None = None
    in_both: bool = False  # as a directory
    vanished: bool = False


class _Level(NamedTuple):
    """A directory that is being compared."""

    subdirectories: list[_Subdirectory]
    listed: bool
    found_before: int


class _Comparison:
    """One walk.  The cursor of the old tree follows only to where it is needed."""

    def __init__(self, new: Cursor, old: Cursor | None, suspects: Container[int]) -> None:
        self._new = new
        self._old = old
        self._suspects = suspects
        self._found: list[Change] = []

    def run(self) -> list[Change]:
        same = self._old is not None and self._is_same(self._new.inode, self._old.inode)
        levels = [
            self._compare_here(_Subdirectory("", self._old is not None, listed=True, same=same))
        ]
        while levels:
            if levels[-1].subdirectories:
                below = levels[-1].subdirectories.pop()
                self._new.enter(below.name)
                levels.append(self._compare_here(below))
                continue
            level = levels.pop()
            if levels:
                self._leave(level)
        return self._found

    def _is_same(self, new: int, old: int) -> bool:
        return new == old and new not in self._suspects

    def _leave(self, level: _Level) -> None:
        if not level.listed and len(self._found) > level.found_before:
            self._found.append(Change("/" + "/".join(self._new.parts), Kind.MODIFY))
        if self._old is not None and len(self._old.parts) == len(self._new.parts):
            self._old.leave()
        self._new.leave()

    def _old_here(self) -> Cursor | None:
        """The old tree's cursor at the place of the new one; None if there is no such place."""
        if self._old is None:
            return None
        try:
            for name in self._new.parts[len(self._old.parts) :]:
                self._old.enter(name)
        except (FileNotFoundError, NotADirectoryError):
            return None  # made in the new tree while we walk: it was the same a moment ago
        return self._old

    def _compare_here(self, here: _Subdirectory) -> _Level:
        found_before = len(self._found)
        prefix = "".join(f"/{part}" for part in self._new.parts) + "/"
        old = self._old_here() if here.in_both and not here.same else None
        before = {} if old is None else {entry.name: entry.inode() for entry in old.entries()}
        subdirectories = []
        for entry in self._new.entries():
            was = entry.inode() if here.same else before.pop(entry.name, None)
            same = was is not None and self._is_same(entry.inode(), was)
            if was is None:
                verdict = _Verdict(Kind.ADD)
            else:
                verdict = _Verdict(in_both=True) if same else self._compare(entry.name)
            if verdict.kind is not None:
                self._found.append(Change(prefix + entry.name, verdict.kind))
            if not verdict.vanished and entry.is_dir(follow_symlinks=False):
                listed = verdict.kind is not None
                below = _Subdirectory(entry.name, verdict.in_both, listed, same)
                subdirectories.append(below)
        self._found.extend(Change(prefix + name, Kind.DELETE) for name in before)
        return _Level(subdirectories, here.listed, found_before)

    def _compare(self, name: str) -> _Verdict:
        """What happened to *name*, which was listed here and may be in both trees."""
        cursor = self._old_here()
        old = None if cursor is None else _status(name, cursor)
        new = _status(name, self._new)
        if new is None:
            return _Verdict(None if old is None else Kind.DELETE, vanished=True)
        if cursor is None or old is None:
            return _Verdict(Kind.ADD)
        both = stat.S_ISDIR(new.st_mode) and stat.S_ISDIR(old.st_mode)
        differs = self._differs(name, new, old, cursor)
        return _Verdict(Kind.MODIFY if differs else None, in_both=both)

    def _differs(self, name: str, new: os.stat_result, old: os.stat_result, cursor: Cursor) -> bool:
        if _status_differs(new, old):
            return True
        if stat.S_ISLNK(new.st_mode):
            target = os.readlink(name, dir_fd=self._new.fd)
            if target != os.readlink(name, dir_fd=cursor.fd):
                return True
        return read_xattrs(name, dir_fd=self._new.fd) != read_xattrs(name, dir_fd=cursor.fd)


def _status(name: str, cursor: Cursor) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=cursor.fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


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


def diff_size(root: Path, changes: Iterable[Change]) -> int:
    """Bytes (lstat) of added and modified non-directories, a hard-linked file once per inode.

    What has vanished since it was listed counts nothing.
    """
    total = 0
    linked: set[tuple[int, int]] = set()
    with Cursor(root) as cursor:
        for change in changes:
            if change.kind is Kind.DELETE:
                continue
            *directory, name = change.parts
            try:
                cursor.move_to(directory)
                status = os.stat(name, dir_fd=cursor.fd, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if stat.S_ISDIR(status.st_mode):
                continue
            if status.st_nlink > 1:
                identity = status.st_dev, status.st_ino
                if identity in linked:
                    continue
                linked.add(identity)
            total += status.st_size
    return total
