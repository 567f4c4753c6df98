"""A snapshot inside the record of its layer: `"snapshot":{...}`, beside Docker's members.

There is no other place where snapshots are kept, so there is none that can disagree: the record is
written inside the transaction that makes the thin device, and replaced as one file later.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from devmapper.deviceset.names import LayerId
from devmapper.deviceset.owners import CONTAINERD, OWNER
from devmapper.deviceset.records import Extra, LayerRecord
from devmapper.snapshots.model import Kind

MEMBER: Final = "snapshot"


class SnapshotRecord(NamedTuple):
    """What is durable of a snapshot; times in nanoseconds since 1970."""

    key: str  # or name; "" of the root, which all others descend from
    kind: Kind
    parent: LayerId  # "" of the root only
    labels: Mapping[str, str]
    created: int
    updated: int
    inodes: int | None = None  # in use in its file system; known of committed ones
    size: int | None = None  # bytes beyond its parent, once somebody has asked


class NotASnapshot(ValueError):
    """A record's member that does not say what it must."""


def encode(record: SnapshotRecord, before: Extra = ()) -> Extra:
    """The members for a layer's record; others that it had *before* stay."""
    members = {
        **record._asdict(),
        "kind": str(record.kind),
        "labels": dict(record.labels),
    }
    known = {name: value for name, value in members.items() if value is not None}
    others = [(name, value) for name, value in before if name not in (OWNER, MEMBER)]
    return ((OWNER, CONTAINERD), (MEMBER, known), *others)


def decode(layer: LayerRecord) -> SnapshotRecord | None:
    """The snapshot that a layer is, None if it is none; `NotASnapshot` for a damaged member."""
    members = dict(layer.extra).get(MEMBER)
    if members is None:
        return None
    if not isinstance(members, dict):
        raise NotASnapshot(f"{MEMBER!r} is no object")
    labels = members.get("labels", {})
    if not isinstance(labels, dict) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in labels.items()
    ):
        raise NotASnapshot("'labels' are no strings")
    kind = _text(members, "kind")
    if kind not in set(Kind):
        raise NotASnapshot(f"kind {kind!r} is not known")
    return SnapshotRecord(
        _text(members, "key"),
        Kind(kind),
        LayerId(_text(members, "parent")),
        labels,
        _number(members, "created"),
        _number(members, "updated"),
        _number(members, "inodes") if "inodes" in members else None,
        _number(members, "size") if "size" in members else None,
    )


def _text(members: Mapping[str, object], name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str):
        raise NotASnapshot(f"{name!r} is no string")
    return value


def _number(members: Mapping[str, object], name: str) -> int:
    value = members.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise NotASnapshot(f"{name!r} is no number")
    return value
