"""A tar stream of changes becomes part of a directory tree, as Docker's `UnpackLayer` does it.

Streams come from strangers: nothing is written, removed, linked or changed outside the root,
whatever names and links they hold.  What was unpacked before an error stays; the caller removes
the layer.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, NamedTuple, NoReturn, Self

from devmapper.errors import ArchiveError
from devmapper.layerdiff import tarformat
from devmapper.layerdiff.archive import WHITEOUT
from devmapper.layerdiff.attributes import AttributeWriter
from devmapper.layerdiff.compression import Decompressed
from devmapper.layerdiff.confined import ConfinedRoot
from devmapper.layerdiff.descent import clear_directory, remove_tree
from devmapper.layerdiff.ids import IDENTITY, Ids
from devmapper.layerdiff.sparse import write_sparse
from devmapper.layerdiff.tarformat import Entry
from devmapper.layerdiff.tarreader import TarReader

OPAQUE: Final = ".wh..wh..opq"
AUFS_METADATA: Final = ".wh..wh."
AUFS_LINKS: Final = ".wh..wh.plnk"

_NAME_MAX: Final = 255
_LINK_MAX: Final = 4095  # PATH_MAX without its NUL
_MAX_ID: Final = 0xFFFFFFFE  # the one above means "leave it", chown(2)
_MAX_MAJOR: Final = 0xFFF
_MAX_MINOR: Final = 0xFFFFF
_MAX_TIME_NS: Final = (1 << 62) * 1_000_000_000
# What a stranger's names can provoke, as opposed to a disk that fails.
_BAD_NAME: Final = frozenset(
    {
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EEXIST,
        errno.EXDEV,
        errno.EINVAL,
        errno.ERANGE,
        errno.E2BIG,
    }
)


def apply(
    root: Path,
    stream: BinaryIO,
    *,
    progress: Callable[[int], None] | None = None,
    ids: Ids = IDENTITY,
) -> int:
    """Unpack the changes in *stream* (plain, gzip, bzip2, xz or zstd) over the tree *root*.

    Returns the sum of the sizes in the entries' headers.  *progress* gets the number of bytes just
    read from *stream*.  Owners are set and device nodes are made for root only, as tar does; ids
    are the container's and become the host's by *ids*, whose root gets parents that are missing.
    Raises `ArchiveError` for a stream that is damaged, reaches out of the root or has an id that no
    map has, `OSError` with the entry as its file name for a disk that refuses.
    """
    reader = TarReader(Decompressed(stream, progress))
    size = 0
    with _Unpacker(root, reader, ids) as unpacker:
        for entry in reader:
            size += entry.size
            try:
                unpacker.add(entry)
            except OSError as err:
                _explain(entry, err)
        unpacker.finish()
    return size


def _explain(entry: Entry, err: OSError) -> NoReturn:
    if err.errno in _BAD_NAME:
        raise ArchiveError(entry.name, f"{err.strerror} ({err.filename!r})") from err
    err.filename = entry.name
    raise err


def _components(name: str, what: str, member: str) -> list[str]:
    """The parts of *name* below the root, cleaned as Go's `filepath.Clean` does."""
    parts: list[str] = []
    for part in name.split("/"):
        if part in ("", "."):
            continue
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        elif not name.startswith("/"):
            raise ArchiveError(member, f"{what} leads out of the layer")
    return parts


def _check_lengths(parts: list[str], member: str) -> None:
    for part in parts:
        if len(os.fsencode(part)) > _NAME_MAX:
            raise ArchiveError(member, f"a name is longer than {_NAME_MAX} bytes")


class _Directory(NamedTuple):
    """What is set on a directory at the end, when nothing is put into it any more."""

    inode: int
    mode: int | None
    mtime_ns: int


class _Unpacker:
    def __init__(self, root: Path, reader: TarReader, ids: Ids) -> None:
        self._is_root = os.geteuid() == 0
        self._ids = ids
        is_owned = self._is_root and not ids.is_identity
        self._root = ConfinedRoot(root, owner=ids.root if is_owned else None)
        self._reader = reader
        # By the inode of the directory, so that a name reached through a link is the same name.
        self._unpacked: dict[int, set[str]] = {}
        self._directories: dict[tuple[str, ...], _Directory] = {}
        self._aufs_links: set[str] = set()
        self._aufs_directory = ""
        self._attributes = AttributeWriter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _value: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            if self._aufs_directory:
                self._root.forget()
                remove_tree(self._aufs_directory, dir_fd=self._root.fd)
        finally:
            self._root.close()

    def add(self, entry: Entry) -> None:
        _check_entry(entry)
        parts = _components(entry.name, "the name", entry.name)
        if not parts:
            self._add_root(self._ids.on_host(entry))
            return
        if parts[0] == AUFS_LINKS:
            self._add_aufs_link(entry, parts)
            return
        name = parts[-1]
        if name.startswith(WHITEOUT):
            self._remove(entry, parts)
            return
        if any(part.startswith(AUFS_METADATA) for part in parts):
            return
        _check_lengths(parts, entry.name)
        self._put(self._ids.on_host(entry), parts)

    def finish(self) -> None:
        """Set the times of the directories, deepest knowledge last: nothing is put in any more."""
        for parts, wanted in self._directories.items():
            try:
                fd = self._root.directory(parts)
            except OSError:
                continue  # a later entry has removed or replaced it
            if os.fstat(fd).st_ino != wanted.inode:
                continue
            path = f"/proc/self/fd/{fd}"
            os.utime(path, ns=(wanted.mtime_ns, wanted.mtime_ns))
            if wanted.mode is not None:
                os.chmod(path, wanted.mode)  # noqa: PTH101

    # -- deletions -----------------------------------------------------------------------------

    def _remove(self, entry: Entry, parts: list[str]) -> None:
        *directory, marker = parts
        name = marker[len(WHITEOUT) :]
        if marker != OPAQUE:
            if marker.startswith(AUFS_METADATA):
                return
            if name in ("", ".", ".."):
                raise ArchiveError(entry.name, "the deletion names no entry")
        _check_lengths([*directory, name], entry.name)
        try:
            fd = self._root.directory(directory)
        except (FileNotFoundError, NotADirectoryError):
            return  # what is to be removed is not there
        if marker == OPAQUE:
            clear_directory(".", dir_fd=fd, keep=self._was_unpacked)
            self._root.forget()
        else:
            self._remove_name(name, fd)

    def _was_unpacked(self, directory: int, name: str) -> bool:
        return name in self._unpacked.get(directory, ())

    def _note_unpacked(self, name: str, fd: int) -> None:
        self._unpacked.setdefault(os.fstat(fd).st_ino, set()).add(name)

    def _remove_name(self, name: str, fd: int) -> None:
        status = _status(name, fd)
        if status is None:
            return
        self._unpacked.get(os.fstat(fd).st_ino, set()).discard(name)
        if stat.S_ISDIR(status.st_mode):
            remove_tree(name, dir_fd=fd)
        else:
            os.unlink(name, dir_fd=fd)
        if stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode):
            self._root.forget()

    # -- additions -----------------------------------------------------------------------------

    def _add_root(self, entry: Entry) -> None:
        if entry.type != tarformat.DIRECTORY:
            raise ArchiveError(entry.name, "an entry would take the place of the layer's root")
        self._set_directory(entry, (), self._root.fd, is_new=False)

    def _put(self, entry: Entry, parts: list[str]) -> None:
        *directory, name = parts
        source = self._link_source(entry) if entry.type == tarformat.HARD_LINK else None
        fd = self._root.directory(directory, create=True)
        there = _status(name, fd)
        is_directory = entry.type == tarformat.DIRECTORY
        if there is not None and not (is_directory and stat.S_ISDIR(there.st_mode)):
            if source is not None and self._is_same_name(source, fd, name):
                raise ArchiveError(entry.name, "the hard link points to itself")
            self._remove_name(name, fd)
            fd = self._root.directory(directory, create=True)
            there = None
        if source is not None:
            self._link(entry, source, directory, name)
        elif entry.type == tarformat.REGULAR:
            self._put_file(entry, name, fd)
        else:
            if there is None:
                self._make(entry, name, fd)
            inode = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                if is_directory:
                    self._set_directory(entry, tuple(parts), inode, is_new=there is None)
                else:
                    self._attributes.set(entry, f"/proc/self/fd/{inode}")
            finally:
                os.close(inode)
        self._note_unpacked(name, self._root.directory(directory))

    def _make(self, entry: Entry, name: str, fd: int) -> None:
        if entry.type == tarformat.DIRECTORY:
            os.mkdir(name, 0o700, dir_fd=fd)
        elif entry.type == tarformat.SYMLINK:
            os.symlink(entry.link, name, dir_fd=fd)
        elif entry.type == tarformat.FIFO:
            os.mkfifo(name, 0o600, dir_fd=fd)
        else:
            if not self._is_root:
                raise ArchiveError(entry.name, "only root can make a device node")
            kind = stat.S_IFCHR if entry.type == tarformat.CHARACTER else stat.S_IFBLK
            device = os.makedev(entry.dev_major, entry.dev_minor)
            os.mknod(name, kind | 0o600, device, dir_fd=fd)

    def _put_file(self, entry: Entry, name: str, fd: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(name, flags, 0o600, dir_fd=fd)
        try:
            end = 0
            for offset, length in self._reader.content():
                end = write_sparse(file, self._reader.buffer, length, offset)
            if end != entry.size:
                os.ftruncate(file, entry.size)
            self._attributes.set(entry, file)
        finally:
            os.close(file)

    # -- hard links ----------------------------------------------------------------------------

    def _link_source(self, entry: Entry) -> list[str]:
        parts = _components(entry.link, "the hard link's target", entry.name)
        if parts and parts[0] == AUFS_LINKS:
            if len(parts) != 2 or parts[1] not in self._aufs_links:
                raise ArchiveError(entry.name, f"hard link to {entry.link!r}, which is not there")
            return [self._aufs_directory, parts[1]]
        _check_lengths(parts, entry.name)
        try:
            status = _status(parts[-1], self._root.directory(parts[:-1])) if parts else None
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is None:
            raise ArchiveError(entry.name, f"hard link to {entry.link!r}, which is not there")
        if stat.S_ISDIR(status.st_mode):
            raise ArchiveError(entry.name, f"hard link to the directory {entry.link!r}")
        return parts

    def _is_same_name(self, source: list[str], fd: int, name: str) -> bool:
        directory = os.fstat(self._root.directory(source[:-1]))
        return source[-1] == name and os.path.samestat(directory, os.fstat(fd))

    def _link(self, entry: Entry, source: list[str], directory: list[str], name: str) -> None:
        try:
            os.link(
                source[-1],
                name,
                src_dir_fd=self._root.directory(source[:-1]),
                dst_dir_fd=self._root.directory(directory),
                follow_symlinks=False,
            )
        except FileNotFoundError as err:  # it was in the directory that this entry replaced
            reason = f"hard link to {entry.link!r}, which is not there"
            raise ArchiveError(entry.name, reason) from err

    def _add_aufs_link(self, entry: Entry, parts: list[str]) -> None:
        """Keep a file that only hard links of this stream refer to; the rest of aufs is ignored."""
        if entry.type != tarformat.REGULAR or len(parts) != 2:
            return
        _check_lengths(parts, entry.name)
        entry = self._ids.on_host(entry)
        if not self._aufs_directory:
            name = f".devmapper-{secrets.token_hex(8)}"
            os.mkdir(name, 0o700, dir_fd=self._root.fd)
            self._aufs_directory = name
            self._note_unpacked(name, self._root.fd)
        fd = self._root.directory([self._aufs_directory])
        self._remove_name(parts[1], fd)
        self._put_file(entry, parts[1], fd)
        self._note_unpacked(parts[1], fd)
        self._aufs_links.add(parts[1])

    # -- attributes ----------------------------------------------------------------------------

    def _set_directory(
        self, entry: Entry, parts: tuple[str, ...], inode: int, *, is_new: bool
    ) -> None:
        # Its owner needs to get into a directory that the archive closes to him.
        mode = entry.mode if self._is_root else entry.mode | stat.S_IRWXU
        path = f"/proc/self/fd/{inode}"
        self._attributes.set(entry._replace(mode=mode), path, is_new=is_new)
        self._directories.pop(parts, None)  # the last entry counts, also through another name
        self._directories[parts] = _Directory(
            os.fstat(inode).st_ino,
            self._attributes.allowed_mode(entry) if mode != entry.mode else None,
            entry.mtime_ns,
        )


def _status(name: str, fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _check_entry(entry: Entry) -> None:
    for what, value, limit in (
        ("user id", entry.uid, _MAX_ID),
        ("group id", entry.gid, _MAX_ID),
        ("major number", entry.dev_major, _MAX_MAJOR),
        ("minor number", entry.dev_minor, _MAX_MINOR),
    ):
        if not 0 <= value <= limit:
            raise ArchiveError(entry.name, f"{what} {value} is out of range")
    if not -_MAX_TIME_NS < entry.mtime_ns < _MAX_TIME_NS:
        raise ArchiveError(entry.name, "the modification time is out of range")
    if entry.type in (tarformat.SYMLINK, tarformat.HARD_LINK) and not entry.link:
        raise ArchiveError(entry.name, "the link has no target")
    if entry.type == tarformat.SYMLINK and len(os.fsencode(entry.link)) > _LINK_MAX:
        raise ArchiveError(entry.name, f"the link's target is longer than {_LINK_MAX} bytes")
    if any("\0" in key for key in entry.xattrs):
        raise ArchiveError(entry.name, "the name of an extended attribute holds a NUL byte")
