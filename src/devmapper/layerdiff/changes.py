"""What differs between two directory trees, with the rules of Docker's `pkg/archive`.

Deliberately stronger than Docker where it overlooks a difference: see docs/internals/layer-diff.md.
Neither tree is written to; nothing is locked, so the caller keeps them still.
"""

import os
import stat
from collections.abc import Iterable
from contextlib import ExitStack
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.layerdiff.attributes import read_xattrs
from devmapper.layerdiff.descent import Cursor

_SECOND: Final = 1_000_000_000


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


def changes(new_root: Path, old_root: Path | None) -> list[Change]:
    """The changes that lead from *old_root* (None: an empty tree) to *new_root*, sorted.

    A directory in which something changed is listed as modified, a deleted directory is one entry,
    an added one is listed with all that it holds.  The root itself is never listed.
    """
    with ExitStack() as stack:
        new = stack.enter_context(Cursor(new_root))
        old = stack.enter_context(Cursor(old_root)) if old_root is not None else None
        found = _Comparison(new, old).run()
    found.sort(key=sort_key)
    return found


class _Subdirectory(NamedTuple):
    name: str
    in_both: bool
    listed: bool


class _Level(NamedTuple):
    """A directory that is being compared."""

    subdirectories: list[_Subdirectory]
    in_both: bool
    listed: bool
    found_before: int


class _Comparison:
    def __init__(self, new: Cursor, old: Cursor | None) -> None:
        self._new = new
        self._old = old
        self._found: list[Change] = []

    def run(self) -> list[Change]:
        levels = [self._compare_here(in_both=self._old is not None, listed=True)]
        while levels:
            if levels[-1].subdirectories:
                below = levels[-1].subdirectories.pop()
                self._new.enter(below.name)
                if below.in_both and self._old is not None:
                    self._old.enter(below.name)
                levels.append(self._compare_here(in_both=below.in_both, listed=below.listed))
                continue
            level = levels.pop()
            if levels:
                self._leave(level)
        return self._found

    def _leave(self, level: _Level) -> None:
        if not level.listed and len(self._found) > level.found_before:
            self._found.append(Change("/" + "/".join(self._new.parts), Kind.MODIFY))
        self._new.leave()
        if level.in_both and self._old is not None:
            self._old.leave()

    def _compare_here(self, *, in_both: bool, listed: bool) -> _Level:
        found_before = len(self._found)
        prefix = "".join(f"/{part}" for part in self._new.parts) + "/"
        before = dict(self._old.scan()) if in_both and self._old is not None else {}
        subdirectories = []
        for name, status in self._new.scan():
            old = before.pop(name, None)
            is_listed = True
            if old is None:
                self._found.append(Change(prefix + name, Kind.ADD))
            elif self._differs(name, status, old):
                self._found.append(Change(prefix + name, Kind.MODIFY))
            else:
                is_listed = False
            if stat.S_ISDIR(status.st_mode):
                both = old is not None and stat.S_ISDIR(old.st_mode)
                subdirectories.append(_Subdirectory(name, both, is_listed))
        self._found.extend(Change(prefix + name, Kind.DELETE) for name in before)
        return _Level(subdirectories, in_both, listed, found_before)

    def _differs(self, name: str, new: os.stat_result, old: os.stat_result) -> bool:
        if _status_differs(new, old):
            return True
        if self._old is None:
            return True
        if stat.S_ISLNK(new.st_mode):
            target = os.readlink(name, dir_fd=self._new.fd)
            if target != os.readlink(name, dir_fd=self._old.fd):
                return True
        return read_xattrs(name, dir_fd=self._new.fd) != read_xattrs(name, dir_fd=self._old.fd)


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
