"""Block targets as files of a FUSE mount: a protocol adapter and nothing else.

One directory, one file per target.  A loop device with direct I/O stands on each file, so there is
no page cache here and no writeback; discards arrive as fallocate, flushes as fsync.  The protocol
is spoken on /dev/fuse itself: what a request costs decides how fast the disk is.

The process that has an `Export` must never open its files or anything that stands on them: a
thread that waits there for the same process keeps /dev/fuse open after SIGKILL, for ever.
"""

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from devmapper.engine.embedded.exported_file import ExportedFile
from devmapper.engine.embedded.fuse_workers import MAX_IO, FuseWorkers, Handler
from devmapper.engine.embedded.target import BlockTarget
from devmapper.linux import fuse, mount
from devmapper.linux.fuse import InitFlag, Opcode, OpenFlag

log = logging.getLogger(__name__)

_DEVICE: Final = Path("/dev/fuse")
FS_TYPE: Final = "fuse.devmapper"
_PAGE: Final = 4096
# More than one blocked loop device can have under way (128), or it would block all the others
_MAX_BACKGROUND: Final = 16384
_WANTED: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.BIG_WRITES
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.ABORT_ERROR
    | InitFlag.MAX_PAGES
)
_NAME_MAX: Final = 255
_STALE: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


class Export:
    """A FUSE mount with one file, of mode 0600, per block target.

    `start` mounts and serves from threads of its own; `close` takes the mount away, whoever still
    uses it.  All methods may be called from any thread.
    """

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self._files: dict[int, ExportedFile] = {}  # by node id
        self._by_name: dict[str, ExportedFile] = {}
        self._next_node = fuse.ROOT_ID + 1  # never used twice: the kernel may remember an old one
        self._changed = threading.Condition()
        self._fd: int | None = None
        self._workers: FuseWorkers | None = None

    def start(self) -> None:
        """Mount and serve; `OSError` of /dev/fuse or of mount(2)."""
        if self._fd is not None:
            raise OSError(errno.EALREADY, "export is already started", str(self.mountpoint))
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            mount.mount(
                "devmapper",
                self.mountpoint,
                FS_TYPE,
                flags=mount.MountFlag.NOSUID | mount.MountFlag.NODEV | mount.MountFlag.NOEXEC,
                data=f"fd={fd},rootmode=40700,user_id={os.geteuid()},group_id={os.getegid()}",
            )
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        try:
            _agree(fd)
            self._workers = FuseWorkers(fd, self._files, self._handlers())
            self._workers.start()
        except BaseException:
            self.close()
            raise
        log.debug("export serves %s", self.mountpoint)

    def close(self) -> None:
        """Unmount and end the threads; I/O that is under way fails.  Nothing to do if not started.

        MNT_FORCE ends the connection even if a loop device or another mount namespace keeps the
        mount alive; without it our threads would wait for requests for ever.
        """
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            mount.unmount(self.mountpoint, flags=mount.UmountFlag.FORCE | mount.UmountFlag.DETACH)
        except OSError as err:
            if err.errno not in (errno.EINVAL, errno.ENOENT):
                raise
            log.warning("export %s was unmounted by somebody else", self.mountpoint)
        workers, self._workers = self._workers, None
        if workers is not None and not workers.join():
            # The descriptor stays open: a thread may still write to that number
            log.warning(
                "export %s: %d threads are still in a device", self.mountpoint, workers.count()
            )
            return
        os.close(fd)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, name: str, target: BlockTarget) -> Path:
        """Export *target* as *name*, and return the file's path; `FileExistsError` if it is there.

        The path is for others: this process must not open it.
        """
        if not name or name in (".", "..") or "/" in name or len(os.fsencode(name)) > _NAME_MAX:
            raise OSError(errno.EINVAL, "not a name of a file", name)
        with self._changed:
            if name in self._by_name:
                raise FileExistsError(errno.EEXIST, "device is already exported", name)
            file = ExportedFile(name, self._next_node, target)
            self._next_node += 1
            self._by_name[name] = file
            self._files[file.node_id] = file
        return self.mountpoint / name

    def remove(self, name: str, *, timeout: float = 1.0) -> None:
        """Take a file away; `OSError` EBUSY if it is still open after *timeout* seconds.

        The kernel tells of the last close some time after it, so a moment's patience is needed.
        Nobody can open the file while this waits.
        """
        with self._changed:
            file = self._find(name)
            file.leaving = True
            if not self._changed.wait_for(lambda: file.opens == 0, timeout):
                file.leaving = False
                raise OSError(errno.EBUSY, "device is open", name)
            # A second caller may have been here while this one waited
            if self._by_name.pop(name, None) is not None:
                del self._files[file.node_id]

    def open_count(self, name: str) -> int:
        with self._changed:
            return self._find(name).opens

    def names(self) -> list[str]:
        with self._changed:
            return sorted(self._by_name)

    def resize(self, name: str) -> None:
        """Show the size that the target has now.

        A loop device above takes it when its owner asks for it (stat of the file, then
        LOOP_SET_CAPACITY).
        """
        with self._changed:
            file = self._find(name)
            file.size = int(file.target.size)

    def _find(self, name: str) -> ExportedFile:
        file = self._by_name.get(name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "device is not exported", name)
        return file

    def _handlers(self) -> Mapping[int, Handler]:
        return {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: _no_answer,
            Opcode.BATCH_FORGET: _no_answer,
            Opcode.INTERRUPT: _no_answer,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.STATFS: self._statfs,
            Opcode.OPENDIR: _open_directory,
            Opcode.READDIR: self._readdir,
            Opcode.RELEASEDIR: _done,
            Opcode.ACCESS: _done,
            Opcode.DESTROY: _done,
        }

    def _lookup(self, node_id: int, behind: bytes) -> bytes:
        name = os.fsdecode(behind.rstrip(b"\0"))
        with self._changed:
            file = self._by_name.get(name)
        if node_id != fuse.ROOT_ID or file is None or file.leaving:
            raise FileNotFoundError(errno.ENOENT, "no such device", name)
        # Names and attributes are valid for no time at all: every look asks, nothing is stale
        return fuse.ENTRY_OUT.pack(file.node_id, 0, 0, 0, 0, 0) + _attributes(file)

    def _getattr(self, node_id: int, _behind: bytes) -> bytes:
        if node_id == fuse.ROOT_ID:
            return fuse.ATTR_OUT.pack(0, 0, 0) + _ROOT_ATTRIBUTES
        return fuse.ATTR_OUT.pack(0, 0, 0) + _attributes(self._node(node_id))

    def _setattr(self, node_id: int, behind: bytes) -> bytes:
        """Times, owner and mode are left as they are, without complaint; a size cannot be set."""
        valid, _, _, size = fuse.SETATTR_IN.unpack_from(behind)
        if valid & fuse.SETATTR_SIZE and size != self._node(node_id).size:
            raise PermissionError(errno.EPERM, "a device cannot be truncated")
        return self._getattr(node_id, behind)

    def _open(self, node_id: int, _behind: bytes) -> bytes:
        with self._changed:
            file = self._node(node_id)
            if file.leaving:
                raise FileNotFoundError(errno.ENOENT, "device is going away", file.name)
            file.opens += 1
        flags = OpenFlag.DIRECT_IO | OpenFlag.PARALLEL_DIRECT_WRITES
        return fuse.OPEN_OUT.pack(0, flags, 0)

    def _release(self, node_id: int, _behind: bytes) -> bytes:
        with self._changed:
            self._node(node_id).opens -= 1
            self._changed.notify_all()
        return b""

    def _statfs(self, node_id: int, _behind: bytes) -> bytes:
        # The loop driver takes f_bsize as the granularity of discards
        file = self._files.get(node_id)
        block = _PAGE if file is None else int(file.target.block_size)
        blocks = 0 if file is None else file.size // block
        return fuse.STATFS_OUT.pack(blocks, 0, 0, 0, 0, block, _NAME_MAX, block, 0)

    def _readdir(self, _node_id: int, behind: bytes) -> bytes:
        _, after, size = fuse.READ_DIR_IN.unpack_from(behind)
        with self._changed:
            entries = [
                (fuse.ROOT_ID, b".", 1, stat.S_IFDIR),
                (fuse.ROOT_ID, b"..", 2, stat.S_IFDIR),
            ]
            # Node ids only grow, which makes them good positions in the directory
            entries += [
                (file.node_id, os.fsencode(file.name), file.node_id + 1, stat.S_IFREG)
                for file in self._by_name.values()
            ]
        reply = b""
        for node_id, name, position, kind in entries:
            if position <= after:
                continue
            entry = fuse.dirent(node_id, position, name, stat.S_IFMT(kind) >> 12)
            if len(reply) + len(entry) > size:
                break
            reply += entry
        return reply

    def _node(self, node_id: int) -> ExportedFile:
        file = self._files.get(node_id)
        if file is None:
            raise OSError(errno.ESTALE, "device is not exported any more")
        return file


def clear_stale(mountpoint: Path) -> bool:
    """Unmount what a killed server left at *mountpoint*; whether there was something.

    Files on it that are still open stay open, and fail.  A mount whose server lives is left alone.
    """
    cleared = False
    while True:
        try:
            mountpoint.stat()
        except FileNotFoundError:
            return cleared
        except OSError as err:
            if err.errno not in _STALE:
                raise
        else:
            return cleared
        mount.unmount(mountpoint, flags=mount.UmountFlag.DETACH)
        cleared = True


def _agree(fd: int) -> None:
    """Answer INIT, which waits when mount(2) has returned."""
    raw = os.read(fd, MAX_IO + fuse.PREFIX_SIZE)
    _, opcode, unique, *_ = fuse.IN_HEADER.unpack_from(raw)
    major, minor, max_readahead, offered = fuse.INIT_IN.unpack_from(raw, fuse.IN_HEADER.size)
    if opcode != Opcode.INIT or major != fuse.KERNEL_VERSION or minor < fuse.KERNEL_MINOR_VERSION:
        raise OSError(errno.EPROTO, f"FUSE {major}.{minor} is not spoken here", str(_DEVICE))
    payload = fuse.INIT_OUT.pack(
        fuse.KERNEL_VERSION,
        fuse.KERNEL_MINOR_VERSION,
        max_readahead,
        _WANTED & offered,
        _MAX_BACKGROUND,
        _MAX_BACKGROUND,
        MAX_IO,
        1,
        MAX_IO // _PAGE,
        0,
        0,
    )
    os.write(fd, fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + len(payload), 0, unique) + payload)


def _attributes(file: ExportedFile) -> bytes:
    return _attr(file.node_id, file.size, stat.S_IFREG | 0o600, 1)


def _attr(node_id: int, size: int, mode: int, links: int) -> bytes:
    now = _STARTED
    return fuse.ATTR.pack(
        node_id, size, size // 512, now, now, now, 0, 0, 0, mode, links, os.geteuid(), os.getegid(),
        0, _PAGE, 0,
    )  # fmt: skip


_STARTED: Final = int(time.time())
_ROOT_ATTRIBUTES: Final = _attr(fuse.ROOT_ID, 0, stat.S_IFDIR | 0o700, 2)


def _open_directory(_node_id: int, _behind: bytes) -> bytes:
    return fuse.OPEN_OUT.pack(0, 0, 0)


def _done(_node_id: int, _behind: bytes) -> bytes:
    return b""


def _no_answer(_node_id: int, _behind: bytes) -> None:
    return None
