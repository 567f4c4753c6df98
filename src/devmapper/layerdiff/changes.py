"""What differs between two directory trees, told one by one in Docker's order.

What is known to be unchanged is not looked at (`unchanged.changed_inodes`): the walk then lists the
directories of the new tree, and asks of the rest no more than where it was changed.  Memory is that
of the directories above the place where the walk is, whatever else the trees hold.
Neither tree is written to; nothing is locked, so the caller keeps them still.
"""

import logging
import os
import stat
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from errno import ELOOP, ENOENT, ENOTDIR
from pathlib import Path
from typing import Final, NamedTuple, Self

from devmapper.layerdiff.descent import Cursor
from devmapper.layerdiff.difference import differs, status_of

log = logging.getLogger(__name__)

_MOST_KNOWN: Final = 1 << 14  # directories; some 4 MiB


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


@contextmanager
def compared(
    new_root: Path, old_root: Path | None, *, suspects: Container[int] | None = None
) -> Iterator[Iterator[Change]]:
    """The changes that lead from *old_root* (None: an empty tree) to *new_root*, one by one.

    They come in Docker's order, by the bytes of their paths, so that a directory precedes what is
    in it.  A directory in which something changed is modified itself, a deleted directory is one
    change, an added one comes with all that it holds.  The root itself is never among them.

    *suspects* are the inode numbers that may mean something else in each tree, None for all.  What
    has any other number in both is the same; a directory has the same names for the same inodes.

    The trees are read as the changes are asked for, and not after the context has ended.
    """
    with ExitStack() as stack:
        new = stack.enter_context(Cursor(new_root))
        old = stack.enter_context(Cursor(old_root)) if old_root is not None else None
        yield _Walk(_Trees(new, old, suspects)).run()


def changes(
    new_root: Path, old_root: Path | None, *, suspects: Container[int] | None = None
) -> list[Change]:
    """All that `compared` yields."""
    with compared(new_root, old_root, suspects=suspects) as found:
        return list(found)


class _Directory:
    """A directory of the new tree that is yet to be entered."""

    __slots__ = ("depth", "in_both", "is_clean", "is_entered", "name", "same")

    def __init__(self, name: str, depth: int, *, in_both: bool, same: bool) -> None:
        self.name = name
        self.depth = depth  # how many there are above it
        self.in_both = in_both
        self.same = same  # the same names for the same inodes in both
        self.is_entered = False
        self.is_clean = False  # nothing in it or below has changed


# What there is to do about a name in a directory: tell a change, or, where the name ends with a
# slash, enter a directory.  By the bytes of these names, all steps are in the order of paths.
# A directory alone is one whose change depends on what is below it, and stands where it is to be
# told: names such as "lib-old" and all that is in them come between "lib" and "lib/".
_Step = tuple[str, "Kind | _Directory"]

# The inodes of a directory in the new tree and of the one in the old tree that it is compared with
_Place = tuple[tuple[int, int], tuple[int, int] | None]


class _Verdict(NamedTuple):
    """On one name: the change that it is, if it is any."""

    kind: Kind | None = None
    in_both: bool = False  # as a directory
    vanished: bool = False


class _Trees:
    """A place in both trees.  The cursor of the old tree follows only to where it is needed."""

    def __init__(self, new: Cursor, old: Cursor | None, suspects: Container[int] | None) -> None:
        self._new = new
        self._old = old
        self._suspects = suspects

    @property
    def parts(self) -> list[str]:
        return self._new.parts

    def root(self) -> _Directory:
        same = self._old is not None and self._is_same(self._new.inode, self._old.inode)
        return _Directory("", -1, in_both=self._old is not None, same=same)

    def place(self, here: _Directory) -> _Place:
        old = self._old_of(here)
        return self._new.identity, None if old is None else old.identity

    @contextmanager
    def aside(self, parts: list[str]) -> Iterator[Self]:
        """The same trees at another place, above this one; this one stays."""
        with ExitStack() as stack:
            new = stack.enter_context(self._new.twin())
            new.move_to(parts)
            old = stack.enter_context(self._old.twin()) if self._old is not None else None
            if old is not None:
                old.move_to(parts[: len(old.parts)])
            yield type(self)(new, old, self._suspects)

    def enter(self, below: _Directory) -> bool:
        """False if the directory has gone since it was listed."""
        try:
            self._new.enter(below.name)
        except OSError as err:
            if err.errno not in (ENOENT, ENOTDIR, ELOOP):
                raise
            path = "/".join([*self._new.parts, below.name])
            log.warning("%r has vanished while the layer was read; it is left out", path)
            return False
        return True

    def leave(self) -> None:
        if self._old is not None and len(self._old.parts) == len(self._new.parts):
            self._old.leave()
        self._new.leave()

    def compare(self, here: _Directory) -> list[_Step]:
        """What there is to do in this directory, in no order."""
        old = self._old_of(here)
        before = {} if old is None else {entry.name: entry.inode() for entry in old.entries()}
        depth = len(self._new.parts)
        steps: list[_Step] = []
        for entry in self._new.entries():
            was = entry.inode() if here.same else before.pop(entry.name, None)
            same = was is not None and self._is_same(entry.inode(), was)
            verdict = _SAME
            if not same:
                verdict = _ADDED if was is None else self._compare(entry.name)
            if verdict.kind is not None:
                steps.append((entry.name, verdict.kind))
            if not verdict.vanished and entry.is_dir(follow_symlinks=False):
                below = _Directory(entry.name, depth, in_both=verdict.in_both, same=same)
                steps.append((entry.name + "/", below))
                if verdict.kind is None:
                    steps.append((entry.name, below))
        steps.extend((name, Kind.DELETE) for name in before)
        return steps

    def _is_same(self, new: int, old: int) -> bool:
        return self._suspects is not None and new == old and new not in self._suspects

    def _old_of(self, here: _Directory) -> Cursor | None:
        return self._old_here() if here.in_both and not here.same else None

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

    def _compare(self, name: str) -> _Verdict:
        """What happened to *name*, which was listed here and may be in both trees."""
        cursor = self._old_here()
        old = None if cursor is None else status_of(name, cursor)
        new = status_of(name, self._new)
        if new is None:
            return _Verdict(None if old is None else Kind.DELETE, vanished=True)
        if cursor is None or old is None:
            return _ADDED
        both = stat.S_ISDIR(new.st_mode) and stat.S_ISDIR(old.st_mode)
        modified = differs(name, new, old, new_in=self._new, old_in=cursor)
        return _Verdict(Kind.MODIFY if modified else None, in_both=both)


_ADDED: Final = _Verdict(Kind.ADD)
_SAME: Final = _Verdict(in_both=True)


class _Walk:
    """One walk through two trees, in the order of paths."""

    def __init__(self, trees: _Trees) -> None:
        self._trees = trees
        self._undecided: list[_Directory] = []  # passed, and modified if anything below is
        self._known: dict[_Place, bool] = {}  # what searches found: is anything in it a change?

    def run(self) -> Iterator[Change]:
        root = self._trees.root()
        levels = [(self._steps(root), root)]
        prefix = "/"
        while levels:
            steps, here = levels[-1]
            if not steps:
                levels.pop()
                if levels:
                    self._pass_over(here)
                    self._trees.leave()
                    prefix = self._prefix()
                continue
            name, what = steps.pop()
            if isinstance(what, Kind):
                yield from self._decide()
                yield Change(prefix + name, what)
            elif not name.endswith("/"):
                self._undecided.append(what)
            elif not what.is_clean and self._enter(what):
                levels.append((self._steps(what), what))
                prefix = self._prefix()

    def _prefix(self) -> str:
        return "".join(f"/{part}" for part in self._trees.parts) + "/"

    def _enter(self, below: _Directory) -> bool:
        below.is_entered = self._trees.enter(below)
        if not below.is_entered:
            self._pass_over(below)
        return below.is_entered

    def _pass_over(self, directory: _Directory) -> None:
        """It is left, and without a change in it that would have decided on it."""
        if self._undecided and self._undecided[-1] is directory:
            self._undecided.pop()

    def _steps(self, here: _Directory) -> list[_Step]:
        """What there is to do in the directory that was entered, the last first."""
        if self._known and self._known.get(self._trees.place(here)) is False:
            return []
        steps = self._trees.compare(here)
        steps.sort(key=_bytes_of_name, reverse=True)
        return steps

    def _decide(self) -> Iterator[Change]:
        """Before a change is told: directories that were passed, if they are modified.

        Those that are above it are.  Of the others, which come before it all the same, nothing is
        known yet: they are searched.
        """
        undecided, self._undecided = self._undecided, []
        for directory in undecided:
            if directory.is_entered or self._is_modified(directory):
                above = self._trees.parts[: directory.depth]
                yield Change("/" + "/".join([*above, directory.name]), Kind.MODIFY)
            else:
                directory.is_clean = True

    def _is_modified(self, directory: _Directory) -> bool:
        """Whether there is any change in *directory*, which is beside one of those above."""
        with self._trees.aside(self._trees.parts[: directory.depth]) as trees:
            return self._search(trees, directory)

    def _search(self, trees: _Trees, top: _Directory) -> bool:
        """Look for any change below *top*, and remember of each directory whether there is one.

        So no directory is searched twice, and none is walked where a search found nothing, as long
        as those that are remembered are not too many.
        """
        pending = [[top]]  # directories to enter, by levels
        way: list[_Place] = []  # of those that were entered and not left
        while pending:
            if not pending[-1]:
                pending.pop()
                if way:
                    self._remember(way.pop(), is_modified=False)
                    trees.leave()
                continue
            here = pending[-1].pop()
            if not trees.enter(here):
                continue
            way.append(trees.place(here))
            known = self._known.get(way[-1])
            steps = trees.compare(here) if known is None else []
            if known or any(isinstance(what, Kind) for _, what in steps):
                for place in way:
                    self._remember(place, is_modified=True)
                return True
            below = [(name, what) for name, what in steps if isinstance(what, _Directory)]
            pending.append([what for name, what in below if name.endswith("/")])
        return False

    def _remember(self, place: _Place, *, is_modified: bool) -> None:
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[place] = is_modified


def _bytes_of_name(step: _Step) -> bytes:
    return os.fsencode(step[0])


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
