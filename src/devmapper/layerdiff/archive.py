"""Changes of a layer as a tar stream, as Docker writes them.

Nothing is locked: a file that changes while it is read yields an archive that is whole all the
same.  Memory does not grow with the content of files nor with their number: only the names of files
that have several are kept.
"""

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final

from devmapper.errors import ArchiveError
from devmapper.layerdiff import tarformat
from devmapper.layerdiff.attributes import describe
from devmapper.layerdiff.changes import Change, Kind, compared
from devmapper.layerdiff.descent import Cursor, open_unseen
from devmapper.layerdiff.ids import IDENTITY, OVERFLOW_ID, Ids
from devmapper.layerdiff.sparse import data_ranges
from devmapper.layerdiff.tarformat import BLOCK, Entry

log = logging.getLogger(__name__)

WHITEOUT: Final = ".wh."

_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK)


def write_tree(root: Path, out: BinaryIO) -> None:
    """Write all of *root*: the difference to an empty tree."""
    with compared(root, None) as found:
        write_diff(root, found, out)


def write_diff(
    root: Path, changes: Iterable[Change], out: BinaryIO, *, ids: Ids = IDENTITY
) -> None:
    """Write *changes* of the tree *root*, as they come, as an uncompressed tar stream.

    They are in the order of paths, as `compared` yields them.
    It holds the container's ids.  An owner that no map of *ids* has becomes 65534, with a warning
    for the first one (moby leaves such a file out).

    Sockets are left out, as Docker does.  What has vanished since it was listed is left out with
    a warning; a file that has shrunk is filled up with zeros.  A name that starts with `.wh.` is
    an `ArchiveError`: the reader would take it for a deletion.
    """
    with Cursor(root) as cursor:
        writer = _DiffWriter(cursor, out, ids)
        for change in changes:
            writer.add(change)
        writer.finish()


class _DiffWriter:
    def __init__(self, cursor: Cursor, out: BinaryIO, ids: Ids) -> None:
        self._cursor = cursor
        self._out = out
        self._ids = ids
        self._has_warned = False  # of ids
        self._buffer = bytearray(_CHUNK)
        self._names: dict[tuple[int, int], str] = {}  # of files with several, where first written

    def add(self, change: Change) -> None:
        path = change.path[1:]
        *directory, name = change.parts
        if name.startswith(WHITEOUT):
            raise ArchiveError(path, f"a layer cannot hold names that start with {WHITEOUT!r}")
        if change.kind is Kind.DELETE:
            self._add_whiteout(directory, name)
            return
        try:
            self._cursor.move_to(directory)
            status = os.stat(name, dir_fd=self._cursor.fd, follow_symlinks=False)
            self._add_inode(change, name, status)
        except FileNotFoundError:
            log.warning("%r has vanished while the layer was read; it is left out", path)

    def finish(self) -> None:
        self._write(bytes(2 * BLOCK))

    def _add_whiteout(self, directory: list[str], name: str) -> None:
        path = "/".join([*directory, WHITEOUT + name])
        self._write(tarformat.encode(Entry(path, tarformat.REGULAR)))

    def _add_inode(self, change: Change, name: str, status: os.stat_result) -> None:
        path = change.path[1:]
        entry = describe(path, name, status, dir_fd=self._cursor.fd)
        if entry is None:  # a socket
            if change.kind is Kind.MODIFY:  # what it has replaced must not come back
                self._add_whiteout(change.parts[:-1], name)
            return
        entry = self._in_container(entry)
        if status.st_nlink > 1 and entry.type != tarformat.DIRECTORY:
            first = self._names.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                link = entry._replace(type=tarformat.HARD_LINK, link=first, size=0, xattrs={})
                self._write(tarformat.encode(link))
                return
        if entry.type == tarformat.REGULAR and entry.size:
            self._add_file(entry, name)
            return
        if entry.type == tarformat.DIRECTORY:
            entry = entry._replace(complete_xattrs=change.kind is Kind.MODIFY)
        self._write(tarformat.encode(entry))

    def _in_container(self, entry: Entry) -> Entry:
        translated, missing = self._ids.in_container(entry)
        if missing and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%r: %s is in none of the maps of the user namespace; such owners become %d in the"
                " archive, and further ones are not named",
                entry.name,
                missing,
                OVERFLOW_ID,
            )
        return translated

    def _add_file(self, entry: Entry, name: str) -> None:
        # O_NONBLOCK: should a fifo have taken its place, do not wait for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = open_unseen(name, flags, dir_fd=self._cursor.fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ArchiveError(entry.name, "the file was replaced while the layer was read")
            self._write(tarformat.encode(entry._replace(size=status.st_size)))
            written = 0
            for start, end in data_ranges(fd, status):
                self._write_zeros(start - written)
                written = self._copy(fd, start, end)
                if written < end:
                    log.warning("%r has shrunk while the layer was read", entry.name)
                    break
            self._write_zeros(status.st_size - written)
            self._write(tarformat.padding(status.st_size))
        finally:
            os.close(fd)

    def _copy(self, fd: int, start: int, end: int) -> int:
        """Write the bytes from *start* to *end*; returns where they ended."""
        view = memoryview(self._buffer)
        while start < end:
            count = os.preadv(fd, [view[: min(end - start, _CHUNK)]], start)
            if not count:
                break
            self._write(view[:count])
            start += count
        return start

    def _write_zeros(self, count: int) -> None:
        view = memoryview(_ZEROS)
        while count > 0:
            length = min(count, _CHUNK)
            self._write(view[:length])
            count -= length

    def _write(self, data: bytes | memoryview) -> None:
        written = self._out.write(data)
        while written < len(data):  # a raw stream may take less
            data = memoryview(data)[written:]
            written = self._out.write(data)
