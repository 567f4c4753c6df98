"""The graph's pool: its two files or devices, its table, its activation and its growth."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.deviceset import pool_devices
from devmapper.deviceset.backing import Backing
from devmapper.deviceset.given_pool import check_empty, find_given_pool, has_begun
from devmapper.deviceset.growth import PoolGrowth, Wanted
from devmapper.deviceset.options import DEFAULT_THINP_BLOCK_SIZE, Options
from devmapper.deviceset.pool_devices import Named
from devmapper.deviceset.records import RecordStore
from devmapper.deviceset.steps import Checkpoint, Step
from devmapper.engine.claims import check_unclaimed
from devmapper.engine.port import Engine, PoolTable, ThinPool
from devmapper.errors import DevmapperError, PoolMismatch, UsageError
from devmapper.linux import blockdev
from devmapper.linux.files import allocated_bytes
from devmapper.thin.format import Superblock
from devmapper.units import SECTOR_SIZE, Bytes, data_block_size

log = logging.getLogger(__name__)

_DEFAULT_BLOCK_SIZE: Final = Bytes(DEFAULT_THINP_BLOCK_SIZE * SECTOR_SIZE)
_DATA: Final = "data"
_METADATA: Final = "metadata"


class ActivePool(NamedTuple):
    """The graph's pool, active."""

    pool: ThinPool
    activated: bool  # by this call, which undoes it if the start fails
    verify: bool  # whether the base layer's identity is to be looked at


class PoolFiles:
    """Finds, makes, activates and grows the pool of one graph.  Call under the graph's lock."""

    def __init__(
        self,
        home: Path,
        name: str,
        options: Options,
        store: RecordStore,
        checkpoint: Checkpoint,
    ) -> None:
        self.name = name
        self._home = home
        self._options = options
        self._store = store
        self._checkpoint = checkpoint
        self.data = self._backing(_DATA, options.data_device)
        self.metadata = self._backing(_METADATA, options.metadata_device)

    @property
    def is_given(self) -> bool:
        """Whether the pool is the administrator's, who activates, resizes and deactivates it."""
        return self._options.thin_pool_device is not None

    def activate(
        self,
        engine: Engine,
        *,
        create: bool,
        before: Callable[[], None],
        has_layers: Callable[[], bool],
    ) -> ActivePool:
        """The active pool.

        With *create* missing loop files are made, those that an option wants larger grow, and a
        disk becomes a pool.  *before* is called first if there is something to do.  *has_layers*
        tells whether the graph has layers, which must not be given an empty pool.
        """
        if self.is_given:
            return self._take_given(engine, create=create, before=before, has_layers=has_layers)
        active = engine.find_pool(self.name)
        if active is not None:
            table = active.table()
            self._check_active(table)
            if create:
                self._enlarge_files(table)
            self._growth(active).catch_up()
            return ActivePool(active, activated=False, verify=False)
        before()
        self._check_nobody_has_the_files()
        pool = engine.activate_pool(self.name, self._prepare(has_layers, create=create))
        self._checkpoint(Step.POOL_ACTIVATED)
        try:
            self._growth(pool).catch_up()
            if self._named() and not has_begun(self._store):
                check_empty(pool)
        except Exception as err:
            self._let_go_after(engine, err)
            raise
        return ActivePool(pool, activated=True, verify=True)

    def table(self) -> PoolTable:
        """The table line for the devices as they are now.

        A pool that exists keeps the size that it has: `PoolGrowth` makes sure of room before it
        takes what the data device has grown by.
        """
        superblock = self._superblock()
        block_size = self._block_size(superblock)
        size = blockdev.size(self.data.device)
        whole = Bytes(size - size % block_size)
        known = pool_devices.data_size_of(superblock) if superblock else Bytes(0)
        if 0 < known < whole and known % block_size == 0:
            whole = known
        return PoolTable(self.metadata.device, self.data.device, whole, block_size)

    def grow(self, pool: ThinPool, size: Bytes | None, metadata_size: Bytes | None) -> None:
        """Let the pool grow, as moby `deviceset.go` ResizePool, and more: see `PoolGrowth`."""
        if self.is_given:
            raise UsageError(
                f"pool {self.name!r} is not made of this graph's files or devices",
                hint="enlarge it with the program that made it, such as lvextend",
            )
        self._growth(pool).grow(Wanted(size, metadata_size))

    def let_go(self, engine: Engine) -> None:
        """Deactivate the pool; one that was given stays active."""
        if not self.is_given:
            engine.deactivate_pool(self.name)

    def _let_go_after(self, engine: Engine, failure: Exception) -> None:
        try:
            engine.deactivate_pool(self.name)
        except (DevmapperError, OSError) as err:
            failure.add_note(f"pool {self.name} stays active: {err}")

    def _check_nobody_has_the_files(self) -> None:
        """`PoolBusy` for a loop file that the kernel has a pool on, before anything is touched."""
        for half in (self.data, self.metadata):
            if half.loop_file is not None and half.loop_file.exists():
                check_unclaimed(half.loop_file)

    def _take_given(
        self,
        engine: Engine,
        *,
        create: bool,
        before: Callable[[], None],
        has_layers: Callable[[], bool],
    ) -> ActivePool:
        before()
        if create and self._options.directlvm_device is not None:
            from devmapper.deviceset import direct_lvm  # LVM is asked once, a graph opened often

            direct_lvm.set_up(self._home, self._options, has_layers=has_layers)
        pool = find_given_pool(engine, self.name, self._store)
        _check_block_size(self._options.block_size, pool.table().block_size)
        # Nobody tells when it was activated; while none of its devices is active, it may be anew
        return ActivePool(pool, activated=False, verify=not pool.devices())

    def _prepare(self, has_layers: Callable[[], bool], *, create: bool) -> PoolTable:
        """Check all of it, then make what is missing; returns the table to activate."""
        named = self._named()
        pool_devices.check_devices(named)
        self._check_pair(has_layers)
        superblock = self._superblock()
        if superblock is None:
            self._check_new_pool(named, has_layers, create=create)
        elif self.metadata.loop_file is None:
            pool_devices.check_holds_pool(self.metadata.device, superblock)
        if self.data.ensure(self._options.loop_data_size, create=create):
            self._checkpoint(Step.DATA_FILE_MADE)
        if self.metadata.ensure(self._options.loop_metadata_size, create=create):
            self._checkpoint(Step.METADATA_FILE_MADE)
        if create:
            self._enlarge_files()
        return self.table()

    def _check_new_pool(
        self, named: list[Named], has_layers: Callable[[], bool], *, create: bool
    ) -> None:
        if self.metadata.device.exists() and has_layers():
            raise PoolMismatch(
                f"metadata device {str(self.metadata.device)!r} is blank, but the graph has layers",
                hint="put the pool's own metadata back; nothing was changed",
            )
        if not create and not self.metadata.device.exists():
            return  # what is missing is said next
        pool_devices.check_nothing_lost(named)
        pool_devices.check_sizes(
            self._size(self.data, self._options.loop_data_size),
            self._size(self.metadata, self._options.loop_metadata_size),
            self._block_size(None),
        )

    def _size(self, half: Backing, size: Bytes) -> Bytes:
        """What it has, or is going to have once its loop file is made or grown."""
        if half.loop_file is None:
            return blockdev.size(half.device)
        return max(size, blockdev.size(half.device)) if half.device.exists() else size

    def _superblock(self) -> Superblock | None:
        """The superblock unchecked; None if it is blank, or there is no file yet."""
        if not self.metadata.device.exists():
            return None
        return pool_devices.peek_superblock(self.metadata.device)

    def _check_active(self, table: PoolTable) -> None:
        """What the options say has to be what the active pool is."""
        _check_block_size(self._options.block_size, table.block_size)
        for option, half, device in (
            ("dm.datadev", self.data, table.data_device),
            ("dm.metadatadev", self.metadata, table.metadata_device),
        ):
            if half.loop_file is None and not half.stands_on(device):
                raise PoolMismatch(
                    f"{option} is {str(half.device)!r}, but the graph's pool is active on"
                    f" {str(device)!r}",
                    hint="leave the option out, or give the one with which the pool was made",
                )

    def _enlarge_files(self, active: PoolTable | None = None) -> None:
        """As moby ensureImage, but only for a size that was given: its default would make any
        smaller file grow to 100 GiB.

        Only those files grow that an *active* pool stands on; and none that was cut off, which a
        hole at its end would hide.
        """
        given = self._options.given & {"dm.loopdatasize", "dm.loopmetadatasize"}
        if not given or not self._is_whole(active):
            return
        if (
            "dm.loopmetadatasize" in given
            and (active is None or self.metadata.loop_file_of(active.metadata_device))
            and self.metadata.enlarge(self._options.loop_metadata_size)
        ):
            self._checkpoint(Step.METADATA_FILE_GROWN)
        if (
            "dm.loopdatasize" in given
            and (active is None or self.data.loop_file_of(active.data_device))
            and self.data.enlarge(self._options.loop_data_size)
        ):
            self._checkpoint(Step.DATA_FILE_GROWN)

    def _is_whole(self, active: PoolTable | None) -> bool:
        if active is None:
            size = blockdev.size(self.data.device)
            return pool_devices.is_whole(self.metadata.device, size)
        if not self.data.loop_file_of(active.data_device):
            return True
        return blockdev.size(self.data.device) >= active.data_size

    def _growth(self, pool: ThinPool) -> PoolGrowth:
        return PoolGrowth(pool, self.data, self.metadata, self._checkpoint)

    def _backing(self, name: str, device: Path | None) -> Backing:
        if device is not None:
            return Backing(device, None)
        file = self._home / "devicemapper" / name
        return Backing(file, file)

    def _named(self) -> list[Named]:
        """The halves that the user named."""
        pairs = (("dm.datadev", self.data), ("dm.metadatadev", self.metadata))
        return [Named(option, half.device) for option, half in pairs if half.loop_file is None]

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

    def _block_size(self, superblock: Superblock | None) -> Bytes:
        """What the metadata say; the option, or 64 KiB, for a pool that is still blank."""
        wanted = self._options.block_size
        if superblock is None:
            return wanted or _DEFAULT_BLOCK_SIZE
        try:
            found = data_block_size(superblock.block_size)
        except UsageError:
            return wanted or _DEFAULT_BLOCK_SIZE  # damaged: the engine says how
        _check_block_size(wanted, found)
        return found


def _check_block_size(wanted: Bytes | None, found: Bytes) -> None:
    if wanted is not None and wanted != found:
        raise PoolMismatch(
            f"pool has blocks of {found} bytes, but dm.blocksize asks for {wanted}",
            hint="leave dm.blocksize out: it is chosen when a pool is made",
        )
