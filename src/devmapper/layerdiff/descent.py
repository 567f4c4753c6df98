"""Walking directory trees of any depth with one descriptor, never through a symbolic link.

Paths are not used below the root, so neither PATH_MAX nor the limit of open files bounds the depth.
"""

import os
import stat
from collections.abc import Callable, Iterator
from errno import ESTALE
from pathlib import Path
from typing import Final, Self

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def open_unseen(name: str, flags: int, *, dir_fd: int) -> int:
    """Open for reading without moving the access time, which would write to a thin device."""
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=dir_fd)
    except PermissionError:  # O_NOATIME is for the owner and for root
        return os.open(name, flags, dir_fd=dir_fd)


class Cursor:
    """A directory below a root that moves by single steps; a context manager.

    Leaving a directory goes through its `..`, which is checked to be where the cursor came from.
    """

    def __init__(self, root: Path | str, *, dir_fd: int | None = None) -> None:
        flags = _DIRECTORY if dir_fd is not None else _DIRECTORY & ~os.O_NOFOLLOW
        self.fd = os.open(root, flags, dir_fd=dir_fd)
        self.parts: list[str] = []
        self._identities = [self._identity()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _identity(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def _step(self, name: str) -> None:
        fd = open_unseen(name, _DIRECTORY, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = fd

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the directory."""
        return self._identities[-1]

    @property
    def inode(self) -> int:
        return self._identities[-1][1]

    def twin(self) -> "Cursor":
        """Another cursor at the same place, which moves for itself."""
        twin = Cursor(".", dir_fd=self.fd)
        twin.parts = list(self.parts)
        twin._identities = list(self._identities)
        return twin

    def enter(self, name: str) -> None:
        self._step(name)
        self.parts.append(name)
        self._identities.append(self._identity())

    def leave(self) -> str:
        """Go to the parent; returns the name of the directory that was left."""
        self._step("..")
        self._identities.pop()
        if self._identity() != self._identities[-1]:
            raise OSError(ESTALE, "directory was moved while it was read", "/".join(self.parts))
        return self.parts.pop()

    def move_to(self, parts: list[str]) -> None:
        """Go to the directory *parts* below the root by the shortest way."""
        common = 0
        for ours, theirs in zip(self.parts, parts, strict=False):
            if ours != theirs:
                break
            common += 1
        while len(self.parts) > common:
            self.leave()
        for name in parts[common:]:
            self.enter(name)

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Names, inode numbers and mostly kinds of what is here, without a stat of each.

        The cursor is not to be moved meanwhile.
        """
        with os.scandir(self.fd) as entries:
            yield from entries

    def scan(self) -> list[tuple[str, os.stat_result]]:
        """Names and lstat of what is here; names that vanish meanwhile are left out."""
        found = []
        with os.scandir(self.fd) as entries:
            for entry in entries:
                try:
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue
        return found


def _keep_nothing(_directory: int, _name: str) -> bool:
    return False


class _Level:
    """A directory that is being cleared: what is left to enter, and whether something stays."""

    __slots__ = ("directories", "keeps")

    def __init__(self, cursor: Cursor, keep: Callable[[int, str], bool]) -> None:
        self.directories: list[str] = []
        self.keeps = False
        for name, status in cursor.scan():
            if stat.S_ISDIR(status.st_mode):
                self.directories.append(name)
            elif keep(cursor.inode, name):
                self.keeps = True
            else:
                os.unlink(name, dir_fd=cursor.fd)


def clear_directory(
    name: str, *, dir_fd: int, keep: Callable[[int, str], bool] = _keep_nothing
) -> None:
    """Remove what is in directory *name*, except entries for which *keep* says so.

    *keep* gets the inode of the directory and the name in it.  A directory that holds something
    that is kept is kept itself.
    """
    with Cursor(name, dir_fd=dir_fd) as cursor:
        levels = [_Level(cursor, keep)]
        while levels:
            if levels[-1].directories:
                cursor.enter(levels[-1].directories.pop())
                levels.append(_Level(cursor, keep))
                continue
            keeps = levels.pop().keeps
            if not levels:
                return
            left = cursor.leave()
            if keeps or keep(cursor.inode, left):
                levels[-1].keeps = True
            else:
                os.rmdir(left, dir_fd=cursor.fd)


def remove_tree(name: str, *, dir_fd: int) -> None:
    """Remove *name*, a directory with all that is in it."""
    clear_directory(name, dir_fd=dir_fd)
    os.rmdir(name, dir_fd=dir_fd)
