"""Every error that this package raises on purpose.

    DevmapperError                       exit
    ├── UsageError                          2   bad argument, unknown option
    ├── EnvironmentLacking                  3   no root, FUSE, loop device, tool, device mapper
    ├── GraphLocked                         4   another process holds the graph
    ├── LayerError
    │   ├── LayerNotFound                  10
    │   │   └── SnapshotNotFound           10
    │   ├── LayerExists                    11
    │   │   └── SnapshotExists             11
    │   ├── LayerBusy                      12
    │   ├── SnapshotStateError             16   of a kind, or with children, that forbid it
    │   ├── LayerNotMounted                14
    │   └── MountFailed                    15   mount(2) refused, or what it would mount is unsafe
    ├── ArchiveError                       13   a tar that is damaged or unsafe
    ├── PoolError
    │   ├── PoolNotFound                   20
    │   ├── PoolFull                       21
    │   ├── PoolUnusable                   22
    │   ├── ThinIdExists                   23
    │   ├── ThinIdMissing                  23
    │   ├── ThinIdsExhausted               23
    │   ├── ThinBusy                       12   a thin device that is active or open
    │   ├── PoolBusy                   12   a pool that another process has open
    │   ├── DeviceBusy                     12   a device for a pool that somebody else uses
    │   ├── PoolMismatch                   25   sizes or identity differ from what is on disk
    │   └── TransactionConflict            24
    ├── IntegrityError
    │   ├── ChecksumError                  30
    │   ├── FormatError                    30
    │   └── RecordCorrupt                  30
    ├── ToolError                          40   a program that we ran failed
    ├── EngineError                        41   the engine's process is gone or does not answer
    │   └── EngineGone                     41   gone: whoever opens the graph next starts another
    └── ServiceDied                        42   a thread of the daemon has died

Classes carry data as attributes and word it in `__str__`; what to do about it is `hint`.
Below the engines everything is a plain `OSError`.
"""

import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import ClassVar


class DevmapperError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(DevmapperError, ValueError):
    exit_code = 2


class EnvironmentLacking(DevmapperError):
    """The machine lacks something; the hint says what to do about it."""

    exit_code = 3


class GraphLocked(DevmapperError):
    exit_code = 4

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(
            f"graph {str(path)!r} is in use by {holder}", hint="wait for it to end, or stop it"
        )
        self.path = path
        self.holder = holder


class LayerError(DevmapperError):
    """Something about one layer."""

    def __init__(self, layer: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.layer = layer


class LayerNotFound(LayerError, LookupError):
    exit_code = 10

    def __init__(self, layer: str) -> None:
        super().__init__(layer, f"layer {layer!r} does not exist", hint="devmapper ls lists them")


class LayerExists(LayerError):
    exit_code = 11

    def __init__(self, layer: str, *, deleted: bool = False) -> None:
        """*deleted*: it exists for nobody any more, but its device is still in use."""
        if deleted:
            message = f"layer {layer!r} is being deleted, and its device is still in use"
            hint = "wait until its last user is gone, or choose another id"
        else:
            message, hint = f"layer {layer!r} already exists", "choose another id"
        super().__init__(layer, message, hint=hint)


class SnapshotNotFound(LayerNotFound):
    """*layer* is the key or name that was asked for."""

    def __init__(self, key: str) -> None:
        LayerError.__init__(self, key, f"snapshot {key!r} does not exist")


class SnapshotExists(LayerExists):
    def __init__(self, key: str) -> None:
        LayerError.__init__(self, key, f"snapshot {key!r} already exists")


class SnapshotStateError(LayerError):
    """The snapshot exists, but its kind or its children forbid what was asked."""

    exit_code = 16


class LayerBusy(LayerError):
    """The layer is mounted or its device is open; *holders* names who keeps it, where known."""

    exit_code = 12

    def __init__(self, layer: str, holders: Sequence[str] = ()) -> None:
        by = f": held by {', '.join(holders)}" if holders else ""
        super().__init__(
            layer,
            f"layer {layer!r} is busy{by}",
            hint="unmount it, or end the processes that use it",
        )
        self.holders = tuple(holders)


class LayerNotMounted(LayerError):
    exit_code = 14

    def __init__(self, layer: str) -> None:
        super().__init__(
            layer, f"layer {layer!r} is not mounted", hint="devmapper get mounts a layer"
        )


class MountFailed(LayerError):
    """The layer's file system could not be mounted, or cannot be used safely."""

    exit_code = 15

    def __init__(self, layer: str, path: Path, reason: str, *, hint: str = "") -> None:
        super().__init__(
            layer,
            f"layer {layer!r} could not be mounted on {str(path)!r}: {reason}",
            hint=hint or "dm.mountopt and the kernel's log may say more",
        )
        self.path = path
        self.reason = reason


class ArchiveError(DevmapperError):
    """A tar stream that is damaged or would write where it must not; *member* names the entry."""

    exit_code = 13

    def __init__(self, member: str, reason: str) -> None:
        where = f"tar entry {member!r}" if member else "tar stream"
        super().__init__(f"{where}: {reason}")
        self.member = member
        self.reason = reason


class PoolError(DevmapperError):
    """Something about the pool as a whole or a thin id in it."""


class PoolNotFound(PoolError, LookupError):
    exit_code = 20


class Space(StrEnum):
    """The two kinds of space in a pool."""

    DATA = "data"
    METADATA = "metadata"


class PoolFull(PoolError):
    exit_code = 21

    def __init__(self, kind: Space, *, free: int, needed: int = 1, hint: str = "") -> None:
        super().__init__(
            f"pool is out of {kind} space: {needed} blocks needed, {free} free",
            hint=hint or "remove layers, or enlarge it with: devmapper pool resize",
        )
        self.kind = kind
        self.free = free
        self.needed = needed


class PoolUnusable(PoolError):
    """The pool's mode forbids it: read-only (needs_check), fail, or out of data space."""

    exit_code = 22

    def __init__(self, mode: str, reason: str = "") -> None:
        why = f": {reason}" if reason else ""
        super().__init__(
            f"pool is in mode {str(mode)!r}{why}",
            hint="devmapper engine stop, then devmapper pool check --clear-needs-check",
        )
        self.mode = mode


class ThinIdError(PoolError):
    exit_code = 23

    def __init__(self, thin_id: int, message: str) -> None:
        super().__init__(message)
        self.thin_id = thin_id


class ThinIdExists(ThinIdError):
    def __init__(self, thin_id: int) -> None:
        super().__init__(thin_id, f"thin id {thin_id} already exists in the pool")


class ThinIdMissing(ThinIdError, LookupError):
    def __init__(self, thin_id: int) -> None:
        super().__init__(thin_id, f"thin id {thin_id} does not exist in the pool")


class ThinIdsExhausted(PoolError):
    exit_code = 23

    def __init__(self) -> None:
        super().__init__("no free thin id is left in the pool (2**24 are in use)")


class ThinBusy(PoolError):
    """A thin device is active, open or suspended, so it cannot be deleted or deactivated."""

    exit_code = 12

    def __init__(self, name: str, holders: Sequence[str] = ()) -> None:
        by = f": held by {', '.join(holders)}" if holders else ""
        super().__init__(f"device {name!r} is busy{by}", hint="unmount it first")
        self.name = name
        self.holders = tuple(holders)


class PoolBusy(PoolError):
    """Another process, or another part of this one, has the pool open."""

    exit_code = 12

    def __init__(self, metadata_device: Path, holder: str) -> None:
        super().__init__(
            f"pool on {str(metadata_device)!r} is in use by {holder}",
            hint="wait for it to end, or stop it",
        )
        self.metadata_device = metadata_device
        self.holder = holder


class DeviceBusy(PoolError):
    """A device that was named for a pool belongs to somebody else; *users* says to whom."""

    exit_code = 12

    def __init__(self, device: Path, users: Sequence[str]) -> None:
        super().__init__(
            f"device {str(device)!r} is in use: {', '.join(users)}",
            hint="a pool's devices belong to it alone: name others, or stop what uses them",
        )
        self.device = device
        self.users = tuple(users)


class PoolMismatch(PoolError):
    """What the caller expects of a pool is not what its superblock or its devices say."""

    exit_code = 25


class TransactionConflict(PoolError):
    exit_code = 24

    def __init__(self, pool: int, expected: int) -> None:
        super().__init__(
            f"transaction id of the pool is {pool}, but {expected} was expected",
            hint="another program has written to this pool, or one of its disks was restored",
        )
        self.pool = pool
        self.expected = expected


class IntegrityError(DevmapperError):
    """Something on disk is damaged."""

    exit_code = 30


class ChecksumError(IntegrityError):
    def __init__(self, block: int, kind: str, *, want: int, got: int) -> None:
        super().__init__(
            f"metadata block {block} ({kind}): checksum is {got:#010x}, computed {want:#010x}",
            hint="devmapper pool check lists all damage",
        )
        self.block = block
        self.kind = kind


class FormatError(IntegrityError):
    """A field of a metadata block holds what it must not."""

    def __init__(self, block: int, field: str, *, want: object, got: object) -> None:
        super().__init__(
            f"metadata block {block}: {field} is {got}, expected {want}",
            hint="devmapper pool check lists all damage",
        )
        self.block = block
        self.field = field
        self.want = want
        self.got = got


class RecordCorrupt(IntegrityError):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"record {str(path)!r} is damaged: {reason}",
            hint="restore the file from a backup; nothing was changed",
        )
        self.path = path
        self.reason = reason


class ToolError(DevmapperError):
    exit_code = 40

    def __init__(self, argv: Sequence[str], status: int, stderr: str) -> None:
        last = stderr.strip().splitlines()[-1:] or ["no message"]
        super().__init__(f"{shlex.join(argv)}: exit status {status}: {last[0]}")
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr


class EngineError(DevmapperError):
    """The embedded engine's process is gone, does not answer or broke its protocol."""

    exit_code = 41


class EngineGone(EngineError):
    """The embedded engine's process has ended: its pool is at its last commit."""


class ServiceDied(DevmapperError):
    """A thread of the daemon, *thread*, has ended by an error that nobody expected."""

    exit_code = 42

    def __init__(self, thread: str, error: BaseException) -> None:
        text = str(error)
        super().__init__(
            f"thread {thread!r} of the daemon has died of {type(error).__name__}"
            + (f": {text}" if text else ""),
            hint="the log has the traceback: report it; start the daemon again",
        )
        self.thread = thread
