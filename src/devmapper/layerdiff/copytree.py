"""A directory of this machine becomes the content of a layer: `cp -a` into an open root.

Hard links, extended attributes and holes are kept; symbolic links of either side are not followed.
"""

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from devmapper.layerdiff import tarformat
from devmapper.layerdiff.attributes import AttributeWriter, describe
from devmapper.layerdiff.confined import ConfinedRoot
from devmapper.layerdiff.descent import Cursor, open_unseen
from devmapper.layerdiff.ids import IDENTITY, Ids
from devmapper.layerdiff.sparse import data_ranges, write_sparse
from devmapper.layerdiff.tarformat import Entry

_CHUNK: Final = 1 << 20
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_tree(
    source_dir: Path,
    root: Path,
    *,
    progress: Callable[[int], None] | None = None,
    ids: Ids = IDENTITY,
) -> int:
    """Copy what is in *source_dir*, and its own owner, mode and times, to the directory *root*.

    Directories merge; any other name that is there already is a `FileExistsError`.  Sockets are
    left out.  Returns the sum of the sizes of the files; *progress* gets the bytes just copied.
    Owners are set and device nodes are made for root only.  As if it were a tar of *source_dir*,
    ids there are the container's and become the host's by *ids*; `ArchiveError` for one that no map
    has.
    """
    with ExitStack() as stack:
        copier = _Copier(
            stack.enter_context(Cursor(source_dir)),
            stack.enter_context(Cursor(root)),
            stack.enter_context(ConfinedRoot(root)),
            progress,
            ids,
        )
        return copier.run()


class _Copier:
    def __init__(
        self,
        source: Cursor,
        target: Cursor,
        root: ConfinedRoot,
        progress: Callable[[int], None] | None,
        ids: Ids,
    ) -> None:
        self._ids = ids
        self._source = source
        self._target = target
        self._root = root
        self._progress = progress
        self._attributes = AttributeWriter()
        self._buffer = bytearray(_CHUNK)
        self._places: dict[tuple[int, int], tuple[str, ...]] = {}  # of files with several names
        self._size = 0

    def run(self) -> int:
        levels = [self._copy_here()]
        while levels:
            if levels[-1]:
                name = levels[-1].pop()
                self._source.enter(name)
                self._target.enter(name)
                levels.append(self._copy_here())
                continue
            levels.pop()
            self._finish_directory()
            if levels:
                self._source.leave()
                self._target.leave()
        return self._size

    def _finish_directory(self) -> None:
        entry = describe(
            "/".join(self._source.parts), ".", os.fstat(self._source.fd), dir_fd=self._source.fd
        )
        if entry is not None:
            self._attributes.set(self._ids.on_host(entry), self._target.fd)

    def _copy_here(self) -> list[str]:
        """Copy all but the directories, which are made and returned."""
        directories = []
        for name, status in self._source.scan():
            if stat.S_ISDIR(status.st_mode):
                directories.append(name)
                self._make_directory(name)
            elif status.st_nlink < 2 or not self._link(name, status):
                self._copy_inode(name, status)
        return directories

    def _make_directory(self, name: str) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=self._target.fd)
        except FileExistsError:
            there = os.stat(name, dir_fd=self._target.fd, follow_symlinks=False)
            if not stat.S_ISDIR(there.st_mode):
                raise

    def _link(self, name: str, status: os.stat_result) -> bool:
        """Make *name* another name of a file that was copied; false if it was not yet."""
        identity = status.st_dev, status.st_ino
        place = self._places.get(identity)
        if place is None:
            self._places[identity] = (*self._target.parts, name)
            return False
        os.link(
            place[-1],
            name,
            src_dir_fd=self._root.directory(place[:-1]),
            dst_dir_fd=self._target.fd,
            follow_symlinks=False,
        )
        return True

    def _copy_inode(self, name: str, status: os.stat_result) -> None:
        path = "/".join([*self._source.parts, name])
        entry = describe(path, name, status, dir_fd=self._source.fd)
        if entry is None:
            return
        entry = self._ids.on_host(entry)
        if entry.type == tarformat.REGULAR:
            self._copy_file(entry, name)
            return
        if entry.type == tarformat.SYMLINK:
            os.symlink(entry.link, name, dir_fd=self._target.fd)
        else:
            os.mknod(
                name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=self._target.fd
            )
        inode = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._target.fd)
        try:
            self._attributes.set(entry, f"/proc/self/fd/{inode}")
        finally:
            os.close(inode)

    def _copy_file(self, entry: Entry, name: str) -> None:
        with ExitStack() as stack:
            source = open_unseen(name, _READ, dir_fd=self._source.fd)
            stack.callback(os.close, source)
            target = os.open(name, _WRITE, 0o600, dir_fd=self._target.fd)
            stack.callback(os.close, target)
            end = 0
            for start, stop in data_ranges(source, os.fstat(source)):
                end = max(end, self._copy_range(source, target, start, stop))
            if end < entry.size:
                os.ftruncate(target, entry.size)
            self._size += entry.size
            self._attributes.set(entry, target)

    def _copy_range(self, source: int, target: int, start: int, stop: int) -> int:
        view = memoryview(self._buffer)
        end = start
        while start < stop:
            count = os.preadv(source, [view[: min(stop - start, _CHUNK)]], start)
            if not count:
                break
            end = write_sparse(target, self._buffer, count, start)
            start += count
            if self._progress is not None:
                self._progress(count)
        return end
