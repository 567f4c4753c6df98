"""The graph's pool: its two files or devices, its table, its activation and its growth."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.deviceset.options import (
    DEFAULT_THINP_BLOCK_SIZE,
    Options,
)
from devmapper.deviceset.steps import Checkpoint, Step
from devmapper.engine.port import Engine, PoolTable, ThinPool
from devmapper.errors import EnvironmentLacking, PoolMismatch, PoolNotFound, UsageError
from devmapper.linux import blockdev, loop
from devmapper.linux.files import allocated_bytes, make_sparse, sync_directory
from devmapper.thin.format import BLOCK_SIZE, Superblock
from devmapper.units import SECTOR_SIZE, Bytes, data_block_size

log = logging.getLogger(__name__)

_DEFAULT_BLOCK_SIZE: Final = Bytes(DEFAULT_THINP_BLOCK_SIZE * SECTOR_SIZE)
_DATA: Final = "data"
_METADATA: Final = "metadata"


class Backing(NamedTuple):
    """What holds one half of the pool."""

    device: Path
    loop_file: Path | None  # the file in the graph's home, unless the user named a device

    def loop_file_of(self, device: Path) -> str:
        """The loop file if *device* is that file, or the loop device on it; else ""."""
        if self.loop_file is None or not _stands_on(device, self.loop_file):
            return ""
        return str(self.loop_file)


class PoolFiles:
    """Finds, makes, activates and grows the pool of one graph.  Call under the graph's lock."""

    def __init__(self, home: Path, name: str, options: Options, checkpoint: Checkpoint) -> None:
        self.name = name
        self._directory = home / "devicemapper"
        self._options = options
        self._checkpoint = checkpoint
        self.data = self._backing(_DATA, options.data_device)
        self.metadata = self._backing(_METADATA, options.metadata_device)

    def activate(
        self,
        engine: Engine,
        *,
        create: bool,
        before: Callable[[], None],
        has_layers: Callable[[], bool],
    ) -> tuple[ThinPool, bool]:
        """The active pool, and whether it was this call that activated it.

        With *create* missing loop files are made.  *before* is called first if there is something
        to do.  *has_layers* tells whether the graph has layers, which must not be given an empty
        pool.
        """
        active = engine.find_pool(self.name)
        if active is not None:
            _check_block_size(self._options.block_size, active.table().block_size)
            return active, False
        before()
        self._check_pair(has_layers)
        self._ensure(self.data, self._options.loop_data_size, create=create)
        self._checkpoint(Step.DATA_FILE_MADE)
        self._ensure(self.metadata, self._options.loop_metadata_size, create=create)
        self._checkpoint(Step.METADATA_FILE_MADE)
        table = self.table()
        if self._superblock() is None and has_layers():
            raise PoolMismatch(
                f"metadata device {str(self.metadata.device)!r} is blank, but the graph has layers",
                hint="put the pool's own metadata back; nothing was changed",
            )
        pool = engine.activate_pool(self.name, table)
        self._checkpoint(Step.POOL_ACTIVATED)
        return pool, True

    def table(self) -> PoolTable:
        """The table line for the devices as they are now."""
        block_size = self._block_size()
        data_size = _size(self.data.device)
        return PoolTable(
            self.metadata.device,
            self.data.device,
            Bytes(data_size - data_size % block_size),
            block_size,
        )

    def grow(self, pool: ThinPool, size: Bytes) -> None:
        """Let data take *size* bytes, as moby `deviceset.go` ResizePool: loop files only.

        A file that has that size already is not touched, so an interrupted growth is completed by
        the same call again.
        """
        table = pool.table()
        file = self.data.loop_file
        if file is None or not self.data.loop_file_of(table.data_device):
            raise UsageError(
                f"data device {str(table.data_device)!r} is not a file of this graph",
                hint="enlarge the device itself and start the graph anew",
            )
        now = _size(file)
        if size < now:
            raise UsageError(
                f"pool cannot shrink: {str(file)!r} has {now} bytes, {size} were asked for"
            )
        with blockdev.opened(file, os.O_RDWR) as fd:
            os.ftruncate(fd, size)
            os.fsync(fd)
        whole = Bytes(size - size % table.block_size)
        if whole > table.data_size:
            pool.resize(table._replace(data_size=whole))

    def _backing(self, name: str, device: Path | None) -> Backing:
        if device is not None:
            return Backing(device, None)
        return Backing(self._directory / name, self._directory / name)

    def _ensure(self, backing: Backing, size: Bytes, *, create: bool) -> None:
        if backing.loop_file is None:
            _check_device(backing.device)
            return
        if backing.loop_file.exists():
            return
        if not create:
            raise PoolNotFound(
                f"loop file {str(backing.loop_file)!r} does not exist",
                hint="the graph's home is another one, or was never initialised",
            )
        if not self._directory.is_dir():
            self._directory.mkdir(mode=0o700)
            sync_directory(self._directory.parent)
        make_sparse(backing.loop_file, size)
        log.info("made loop file %s of %d bytes", backing.loop_file, size)

    def _check_pair(self, has_layers: Callable[[], bool]) -> None:
        """Refuse to put a new file beside an old one: together they are no pool.

        moby does it, and then does not even read the pool's transaction id.
        """
        data, metadata = self.data.loop_file, self.metadata.loop_file
        missing = [str(file) for file in (data, metadata) if file and not file.exists()]
        if missing and has_layers():
            raise PoolMismatch(
                f"the graph has layers, but {missing[0]!r} does not exist",
                hint="put the file back, or start with an empty home",
            )
        if len(missing) != 1:
            return
        if metadata and not metadata.exists() and data and allocated_bytes(data) == 0:
            return  # a first start that was interrupted between the two
        if metadata and metadata.exists() and self._superblock() is None:
            return
        if data is None or metadata is None:
            return  # one of the two is the user's own device, which decides for itself
        raise PoolMismatch(
            f"{missing[0]!r} does not exist, but the other half of the pool holds something",
            hint="put the file back, or move the other one away",
        )

    def _block_size(self) -> Bytes:
        """What the metadata say; the option, or 64 KiB, for a pool that is still blank."""
        superblock = self._superblock()
        wanted = self._options.block_size
        if superblock is None:
            return wanted or _DEFAULT_BLOCK_SIZE
        try:
            found = data_block_size(superblock.block_size)
        except UsageError:
            return wanted or _DEFAULT_BLOCK_SIZE  # damaged: the engine says how
        _check_block_size(wanted, found)
        return found

    def _superblock(self) -> Superblock | None:
        """The superblock unchecked, None if the first block is blank."""
        with open(self.metadata.device, "rb") as file:
            raw = file.read(BLOCK_SIZE)
        if len(raw) < BLOCK_SIZE or not any(raw):
            return None
        return Superblock.unpack(raw)


def _check_block_size(wanted: Bytes | None, found: Bytes) -> None:
    if wanted is not None and wanted != found:
        raise PoolMismatch(
            f"pool has blocks of {found} bytes, but dm.blocksize asks for {wanted}",
            hint="leave dm.blocksize out: it is chosen when a pool is made",
        )


def _stands_on(device: Path, file: Path) -> bool:
    if os.path.realpath(file) == os.path.realpath(device):
        return True
    try:
        status = loop.find_status(device)
        return status is not None and status.backs(file.stat())
    except OSError:  # no loop device (ENOTTY), or no file any more
        return False


def _size(path: Path) -> Bytes:
    return blockdev.size(path)


def _check_device(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        what = "does not exist" if err.errno == errno.ENOENT else f"cannot be opened: {err}"
        raise EnvironmentLacking(
            f"device {str(path)!r} {what}", hint="check dm.datadev and dm.metadatadev"
        ) from err
    os.close(fd)
