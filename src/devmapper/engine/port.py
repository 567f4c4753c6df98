"""What every engine is: "a thin pool", twice.

The port speaks of pools, thin ids, activation, suspension and status; nothing of layers.  The
kernel's device mapper is one implementation, `devmapper.engine.embedded` the other; one
conformance suite (`tests/conformance/engine_suite.py`) runs on both.

Errors: implementations raise the `PoolError` half of `devmapper.errors`, `IntegrityError`,
`EnvironmentLacking` and `EngineError`; what they cannot translate stays `OSError`.

Durability: `create_thin`, `create_snap` and `delete` are durable at the latest when the next
`set_transaction_id`, `commit` or flush of a device of the pool returns.  After a crash the pool is
at one of its commits, never between.

Threads: every method may be called from any thread.
"""

from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Protocol

from devmapper.units import Bytes, ThinId, TransactionId


class PoolMode(StrEnum):
    """The kernel's words (`dm-thin.c: enum pool_mode`), as `dmsetup status` prints them."""

    WRITE = "rw"
    OUT_OF_DATA_SPACE = "out_of_data_space"
    READ_ONLY = "ro"
    FAIL = "fail"


class Activation(StrEnum):
    """State of a device; asked of the system, never stored."""

    ABSENT = "absent"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    LEAVING = "leaving"  # deferred removal: goes away when the last user closes it


class Outcome(StrEnum):
    """What an operation that may find its work done did."""

    DONE = "done"
    ALREADY = "already"


class PoolTable(NamedTuple):
    """The pool's table line, `0 <len> thin-pool <metadata> <data> <block size> <low water> …`.

    The two devices may be regular files.  An engine that needs block devices puts loop devices on
    them, which go away with the pool; the table of the active pool then names the loop devices.
    """

    metadata_device: Path
    data_device: Path
    data_size: Bytes  # length of the pool; a multiple of block_size
    block_size: Bytes
    low_water_mark: int = 32768  # in data blocks, as moby passes it
    skip_block_zeroing: bool = True
    error_if_no_space: bool = False
    ignore_discard: bool = False
    no_discard_passdown: bool = False
    read_only: bool = False


class PoolStatus(NamedTuple):
    """The pool's status line."""

    transaction_id: TransactionId
    used_metadata_blocks: int  # of 4 KiB
    total_metadata_blocks: int
    used_data_blocks: int
    total_data_blocks: int
    block_size: Bytes
    held_metadata_root: int | None
    mode: PoolMode
    needs_check: bool
    error_if_no_space: bool
    discard_passdown: bool
    low_water_reached: bool


class ThinStatus(NamedTuple):
    """Status line of a thin device, by thin id (no need for it to be active)."""

    thin_id: ThinId
    mapped_blocks: int
    highest_mapped_block: int | None
    transaction_id: TransactionId
    creation_time: int
    snapshotted_time: int


class NbdExport(NamedTuple):
    """How a thin device is served over NBD."""

    socket: Path
    read_only: bool
    clients: tuple[str, ...] = ()  # in words; those that are connected

    def uri(self) -> str:
        """The address, as QEMU and libnbd take it."""
        from urllib.parse import quote

        return f"nbd+unix:///?socket={quote(str(self.socket), safe='/:')}"


class ChangedRange(NamedTuple):
    """Where two thin devices may differ, in bytes from their beginning; whole data blocks."""

    begin: Bytes
    length: Bytes


class DeviceInfo(NamedTuple):
    """An activated thin device."""

    name: str
    thin_id: ThinId
    size: Bytes
    path: Path  # the block device: /dev/mapper/<name> or /dev/loop<n>; or the socket of `nbd`
    state: Activation
    open_count: int  # users that the engine can see; 0 = free to deactivate
    nbd: NbdExport | None = None  # it is served, and there is no block device


class EngineFeatures(NamedTuple):
    """What `info` says about the engine at work."""

    name: str  # "kernel" | "embedded"
    library_version: str
    driver_version: str
    udev_sync: bool
    udev_sync_needed: bool  # False where there is no udev to wait for
    deferred_removal: bool


class ThinPool(Protocol):
    """One active pool and the devices on it."""

    @property
    def name(self) -> str: ...
    def table(self) -> PoolTable: ...
    def status(self) -> PoolStatus:
        """How the pool is now, uncommitted changes included; it does not commit for that."""

    def thin_ids(self) -> list[ThinId]: ...
    def thin_status(self, thin_id: ThinId) -> ThinStatus: ...
    def changed_ranges(self, thin_a: ThinId, thin_b: ThinId) -> list[ChangedRange]:
        """Where two thin devices may read differently, ascending; everything else is equal.

        What has reached the devices when it is called counts (a write that waits in a cache above
        has not: `suspended` before).  Equal means the same data block or none on either side, so
        equal bytes in two data blocks are a range too, and where there are very many ranges, some
        are merged across what lies between.  `ThinIdMissing`.
        """

    def own_blocks(self, thin_id: ThinId, origin: ThinId) -> int:
        """How many data blocks *thin_id* does not have in common with *origin*; as above."""

    def create_thin(self, thin_id: ThinId) -> None: ...
    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        """Snapshot *origin*; an active origin has to be suspended by the caller (`suspended`)."""

    def delete(self, thin_id: ThinId) -> None:
        """Delete; `ThinBusy` while it is active, `ThinIdMissing` when it is not there."""

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        """Move the user-space transaction id and commit; `TransactionConflict` if it differs."""

    def commit(self) -> None:
        """Make everything done so far durable."""

    def resize(self, table: PoolTable) -> None:
        """Load *table*, whose data size has grown, and take what the metadata device has grown by.

        The files or devices have their new sizes already; devices of the pool may be in use.
        """

    def export_metadata(self, target: Path) -> None:
        """Write a consistent copy of the pool's committed metadata to *target* (a sparse file)."""

    def activate(self, name: str, thin_id: ThinId, size: Bytes) -> Path:
        """Make the block device; a device already active under *name* is returned as it is."""

    def deactivate(self, name: str, *, deferred: bool = False) -> Outcome:
        """Remove the block device; not active is ALREADY.

        Busy: `ThinBusy`; with *deferred* it becomes LEAVING instead, without waiting.  Without
        *deferred* one that is LEAVING is removed if nobody uses it any more.
        """

    def cancel_deferred(self, name: str) -> Outcome: ...
    def info(self, name: str) -> DeviceInfo | None: ...
    def devices(self) -> list[DeviceInfo]: ...
    def suspended(self, name: str) -> AbstractContextManager[None]:
        """Freeze the file system on it, drain and flush its I/O; undone on leaving, on every path.

        A device that is not active: nothing to do.  One that is LEAVING may be `ThinBusy`: cancel
        that before.
        """

    def discard_device(self, name: str) -> None:
        """BLKDISCARD over the whole of an active device."""

    def serve_nbd(
        self, name: str, thin_id: ThinId, size: Bytes, socket: Path | None, *, read_only: bool
    ) -> NbdExport:
        """Serve the device over NBD instead of making a block device; `deactivate` ends it.

        On *socket*, or on one that the engine chooses.  One that is served in the same way already
        stays as it is; `ThinBusy` if it is served otherwise or has a block device.
        `EnvironmentLacking` where the engine does not serve devices, but makes block devices.
        """


class Engine(Protocol):
    """A way to have pools on this machine."""

    def features(self) -> EngineFeatures: ...
    def find_pool(self, name: str) -> ThinPool | None:
        """The pool if it is active now (in the kernel, or held by a running engine process).

        `PoolMismatch` if the name belongs to something that is no thin pool.
        """

    def activate_pool(self, name: str, table: PoolTable) -> ThinPool:
        """Activate; metadata whose first block is zero are formatted, as the kernel does it."""

    def deactivate_pool(self, name: str) -> Outcome:
        """Commit and let go of it; not active is ALREADY.

        `ThinBusy` while a device on it is in use; idle devices are deactivated with it.
        """
