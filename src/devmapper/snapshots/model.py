"""What a snapshot is, in the words of containerd's Snapshots service.

containerd `core/snapshots/snapshotter.go` has the meaning of each.  No I/O.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    VIEW = "view"  # read-only, of a committed snapshot
    ACTIVE = "active"  # writable, until it is committed or removed
    COMMITTED = "committed"  # what others can be made from


class Info(NamedTuple):
    """One snapshot; times in nanoseconds since 1970 (UTC)."""

    name: str  # the key of an active snapshot or a view, the name of a committed one
    kind: Kind
    parent: str  # name of a committed snapshot, "" without one
    labels: Mapping[str, str]
    created: int
    updated: int


class Usage(NamedTuple):
    """What a snapshot takes beyond its parent."""

    size: int  # bytes
    inodes: int


class Mount(NamedTuple):
    """How to mount a snapshot: mount(8)'s type, source and options."""

    type: str  # ext4 or xfs
    source: str  # a block device
    options: tuple[str, ...]
    target: str = ""  # relative to where it is mounted, as containerd has it; always the root here
