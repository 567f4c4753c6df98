"""Edits of a directory tree as data: what a program can do to files, and a comparison may overlook.

An edit names its operation and what it is done to by numbers, so that a script of edits can be
generated, shrunk and repeated on any tree.  An edit that cannot be done there does nothing.
"""

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from devmapper.linux import libc

SECOND: Final = 1_000_000_000
SIZES: Final = (0, 1, 9, 60, 150, 4096, 70_000)
_NAMES: Final = 12  # few, so that edits meet each other's work


class Edit(NamedTuple):
    """*a* and *b* choose among the names that are there, *n* among what is done to them."""

    operation: str
    a: int = 0
    b: int = 0
    n: int = 0


def apply_edits(root: str, edits: list[Edit]) -> int:
    """Do all that can be done; returns how many could."""
    done = 0
    for edit in edits:
        with suppress(OSError, ZeroDivisionError):  # there is nothing of the kind to choose from
            OPERATIONS[edit.operation](Place(root, edit), edit.n)
            done += 1
    return done


class Place:
    """What an edit is done to: names are looked up when they are asked for."""

    def __init__(self, root: str, edit: Edit) -> None:
        self.root = root
        self._a = edit.a
        self._b = edit.b
        self._n = edit.n
        self._paths: list[str] = []
        self._directories = [root]
        for directory, directories, files in os.walk(root):
            self._directories += [os.path.join(directory, name) for name in sorted(directories)]
            self._paths += [os.path.join(directory, name) for name in [*directories, *files]]
        self._paths.sort()

    def any(self) -> str:
        return self._paths[self._a % len(self._paths)]

    def other(self) -> str:
        return self._paths[self._b % len(self._paths)]

    def directory(self) -> str:
        real = [each for each in self._directories if not os.path.islink(each)]
        return real[self._b % len(real)]

    def fresh(self) -> str:
        return os.path.join(self.directory(), f"n{self._n % _NAMES}")

    def file(self) -> str:
        return self._of_kind(stat.S_ISREG, self._a)

    def other_file(self) -> str:
        return self._of_kind(stat.S_ISREG, self._b)

    def symlink(self) -> str:
        return self._of_kind(stat.S_ISLNK, self._a)

    def _of_kind(self, is_kind: Callable[[int], bool], number: int) -> str:
        found = [path for path in self._paths if is_kind(os.lstat(path).st_mode)]
        return found[number % len(found)]


def _put_back_times(path: str, before: os.stat_result) -> None:
    times = (before.st_atime_ns, before.st_mtime_ns)
    os.utime(path, ns=times, follow_symlinks=False)


def _content(size: int, seed: int) -> bytes:
    return bytes([97 + seed % 26]) * size


# -- content -----------------------------------------------------------------------------------


def create(place: Place, n: int) -> None:
    with open(place.fresh(), "xb") as file:
        file.write(_content(SIZES[n % len(SIZES)], n))


def overwrite(place: Place, n: int) -> None:
    with open(place.file(), "r+b") as file:
        file.seek(n % 100)
        file.write(b"%d" % n)


def overwrite_in_secret(place: Place, n: int) -> None:
    """The same size and time: no change, by Docker's rules."""
    path = place.file()
    before = os.lstat(path)
    with open(path, "r+b") as file:
        file.write(_content(min(5, before.st_size), n))
    _put_back_times(path, before)


def append(place: Place, n: int) -> None:
    with open(place.file(), "ab") as file:
        file.write(_content(SIZES[n % len(SIZES)], n))


def append_in_secret(place: Place, n: int) -> None:
    """Another size at the same time."""
    path = place.file()
    before = os.lstat(path)
    with open(path, "ab") as file:
        file.write(_content(1, n))
    _put_back_times(path, before)


def truncate(place: Place, n: int) -> None:
    os.truncate(place.file(), (0, 1, 5000, 100_000)[n % 4])


def write_behind_a_hole(place: Place, n: int) -> None:
    with open(place.file(), "r+b") as file:
        file.seek((n % 4 + 1) * 50_000)
        file.write(_content(3, n))


def make_sparse(place: Place, n: int) -> None:
    """A hole where content was, in a file of the same size."""
    path = place.file()
    before = os.lstat(path)
    os.truncate(path, before.st_size // 2)
    os.truncate(path, before.st_size)
    if n % 2:
        _put_back_times(path, before)


def preallocate(place: Place, n: int) -> None:
    with open(place.file(), "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 16_384 * (n % 3 + 1))


def replace_atomically(place: Place, n: int) -> None:
    """As editors and package managers do."""
    path = place.file()
    with open(path + "~", "xb") as file:
        file.write(_content(os.lstat(path).st_size, n))
    if n % 2:
        _put_back_times(path + "~", os.lstat(path))
    os.rename(path + "~", path)


def make_again(place: Place, n: int) -> None:
    """Mostly with the same inode number."""
    path = place.file()
    before = os.lstat(path)
    os.unlink(path)
    with open(path, "xb") as file:
        file.write(_content(before.st_size, n))
    if n % 2:
        _put_back_times(path, before)


def make_two_again(place: Place, n: int) -> None:
    """With each other's inode numbers, as it mostly comes."""
    one, other = place.file(), place.other_file()
    before = os.lstat(one), os.lstat(other)
    os.unlink(one)
    os.unlink(other)
    for path, status in zip((other, one), reversed(before), strict=True):
        with open(path, "xb") as file:
            file.write(_content(status.st_size, n))
        if n % 2:
            _put_back_times(path, status)


# -- attributes --------------------------------------------------------------------------------


def mode(place: Place, n: int) -> None:
    path = place.any()
    if not os.path.islink(path):
        os.chmod(path, (0o700, 0o755, 0o4755)[n % 3])


def owner(place: Place, n: int) -> None:
    os.lchown(place.any(), n % 3, n // 3 % 3)


def time(place: Place, n: int) -> None:
    when = (0, 1_600_000_000 * SECOND, 1_600_000_000 * SECOND + 5)[n % 3]
    os.utime(place.any(), ns=(when, when), follow_symlinks=False)


def attribute(place: Place, n: int) -> None:
    """In the inode, or in a block of its own."""
    value = _content((3, 60, 300, 2000)[n % 4], n)
    os.setxattr(place.any(), f"trusted.t{n % 3}", value, follow_symlinks=False)


def attribute_of_the_same_length(place: Place, n: int) -> None:
    path = place.any()
    for name in os.listxattr(path, follow_symlinks=False):
        value = os.getxattr(path, name, follow_symlinks=False)
        os.setxattr(path, name, _content(len(value), n), follow_symlinks=False)


def no_attribute(place: Place, n: int) -> None:
    path = place.any()
    names = os.listxattr(path, follow_symlinks=False)
    os.removexattr(path, names[n % len(names)], follow_symlinks=False)


# -- names -------------------------------------------------------------------------------------


def link(place: Place, _n: int) -> None:
    os.link(place.file(), place.fresh())


def unlink(place: Place, _n: int) -> None:
    os.unlink(place.file())


def unlink_one_of_several(place: Place, n: int) -> None:
    path = place.file()
    os.link(path, place.fresh())
    os.unlink(path if n % 2 else place.fresh())


def rename(place: Place, _n: int) -> None:
    os.rename(place.any(), place.fresh())


def rename_over(place: Place, _n: int) -> None:
    os.rename(place.any(), place.other())


def rename_directory(place: Place, _n: int) -> None:
    source = os.path.dirname(place.any())
    if source != place.root:
        os.rename(source, place.fresh())


def swap(place: Place, _n: int) -> None:
    one, other = place.any(), place.other()
    between = os.path.join(place.root, "between")
    os.rename(one, between)
    try:
        os.rename(other, one)
    except OSError:
        os.rename(between, one)
        raise
    os.rename(between, other)


def rename_and_back(place: Place, n: int) -> None:
    path = place.any()
    os.rename(path, path + "~")
    if n % 2:
        with open(path, "xb"):
            pass
        os.unlink(path)
    os.rename(path + "~", path)


# -- kinds -------------------------------------------------------------------------------------


def make_directory(place: Place, _n: int) -> None:
    os.mkdir(place.fresh())


def remove_directory(place: Place, _n: int) -> None:
    path = os.path.dirname(place.any())
    if path != place.root:
        shutil.rmtree(path)


def directory_to_file(place: Place, n: int) -> None:
    path = os.path.dirname(place.any())
    if path != place.root:
        shutil.rmtree(path)
        with open(path, "xb") as file:
            file.write(_content(n % 9, n))


def file_to_directory(place: Place, n: int) -> None:
    path = place.file()
    os.unlink(path)
    os.mkdir(path)
    for number in range(n % 3):
        with open(os.path.join(path, f"below{number}"), "xb"):
            pass


def directory_made_again(place: Place, n: int) -> None:
    """A directory with the same names, and mostly the same inode numbers."""
    path = os.path.dirname(place.any())
    if path == place.root:
        return
    names = os.listdir(path)
    shutil.rmtree(path)
    os.mkdir(path)
    for name in names if n % 2 else reversed(names):
        with open(os.path.join(path, name), "xb"):
            pass


def grow_directory(place: Place, n: int) -> None:
    """To several blocks: an index on ext4, a tree on xfs."""
    directory = place.directory()
    for number in range(20 * (n % 5 + 1)):
        name = f"{n % 2}-{number:03}-" + "long" * 40
        with suppress(FileExistsError), open(os.path.join(directory, name), "xb"):
            pass


def empty_directory(place: Place, n: int) -> None:
    """It keeps its blocks on ext4, and goes back to the inode on xfs."""
    directory = place.directory()
    if directory != place.root:
        for name in os.listdir(directory)[n % 3 :]:
            with suppress(IsADirectoryError, PermissionError):
                os.unlink(os.path.join(directory, name))


def deepen(place: Place, n: int) -> None:
    path = place.directory()
    for _ in range(10 * (n % 3 + 1)):
        path = os.path.join(path, "d")
        os.mkdir(path)
    with open(os.path.join(path, "deepest"), "xb"):
        pass


def symlink(place: Place, n: int) -> None:
    os.symlink(("short", "long" * 100)[n % 2], place.fresh())


def symlink_of_the_same_length(place: Place, n: int) -> None:
    path = place.symlink()
    before, target = os.lstat(path), os.readlink(path)
    os.unlink(path)
    os.symlink(target[:-1] + chr(65 + n % 26), path)
    _put_back_times(path, before)


def node(place: Place, n: int) -> None:
    kind = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)[n % 4]
    os.mknod(place.fresh(), kind | 0o600, os.makedev(1, n % 9) if n % 4 < 2 else 0)


def other_node(place: Place, n: int) -> None:
    """A name becomes a device, or a device another one."""
    path = place.any()
    before = os.lstat(path)
    os.unlink(path)
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, n % 9))
    _put_back_times(path, before)


# -- when --------------------------------------------------------------------------------------


def write_back(place: Place, _n: int) -> None:
    """What was done before is on its device, what comes after it perhaps not."""
    fd = os.open(place.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libc.syncfs(fd)
    finally:
        os.close(fd)


def write_one_back(place: Place, _n: int) -> None:
    """A commit of the journal, no more."""
    fd = os.open(place.file(), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


OPERATIONS: Final[dict[str, Callable[[Place, int], None]]] = {
    each.__name__: each
    for each in (
        create, overwrite, overwrite_in_secret, append, append_in_secret, truncate,
        write_behind_a_hole, make_sparse, preallocate, replace_atomically, make_again,
        make_two_again, mode, owner, time, attribute, attribute_of_the_same_length, no_attribute,
        link, unlink, unlink_one_of_several, rename, rename_over, rename_directory, swap,
        rename_and_back, make_directory, remove_directory, directory_to_file, file_to_directory,
        directory_made_again, grow_directory, empty_directory, deepen, symlink,
        symlink_of_the_same_length, node, other_node, write_back, write_one_back,
    )
}  # fmt: skip
