"""Whom a layer belongs to: members of its record that Docker does not know and leaves alone.

Read leniently: a member of the wrong type is as good as none, for this only tells who to ask before
a layer is touched.  What snapshots need of theirs is `devmapper.snapshots.record`'s affair.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from devmapper.deviceset.records import Extra, LayerRecord

OWNER: Final = "owner"
DOCKER: Final = "docker"
CONTAINERD: Final = "containerd"
_SNAPSHOT: Final = "snapshot"


class SnapshotName(NamedTuple):
    """What containerd calls the layer."""

    key: str  # or the name of a committed one; "" of the root, which all others descend from
    kind: str  # view, active or committed
    parent: str  # id of a layer, "" of the root only


class Ownership(NamedTuple):
    """For whom a front end has made a layer."""

    owner: str = ""  # "" for the command line, the Python API, and Docker without the plugin
    snapshot: SnapshotName | None = None

    @property
    def is_snapshot(self) -> bool:
        """Whether its root is the root of the file system: containerd's, not Docker's layout."""
        return self.owner == CONTAINERD

    def __str__(self) -> str:
        """Such as `docker` or `containerd: active snapshot 'k8s.io/7/web'`; "" for nobody."""
        if self.snapshot is None:
            return self.owner
        if not self.snapshot.key:
            return f"{self.owner}: root of all snapshots"
        return f"{self.owner}: {self.snapshot.kind} snapshot {self.snapshot.key!r}"


def owned_by(owner: str) -> Extra:
    """What the record of a layer holds that *owner* has made."""
    return ((OWNER, owner),)


def owner_of(record: LayerRecord) -> str:
    """Who made the layer through one of our front ends; "" for everybody else."""
    return _text(dict(record.extra), OWNER)


def ownership_of(record: LayerRecord) -> Ownership:
    """Whom the layer belongs to, and as what."""
    members = dict(record.extra)
    snapshot = members.get(_SNAPSHOT)
    if not isinstance(snapshot, dict):
        return Ownership(_text(members, OWNER))
    name = SnapshotName(*(_text(snapshot, field) for field in SnapshotName._fields))
    return Ownership(CONTAINERD, name)


def _text(members: Mapping[str, object], name: str) -> str:
    found = members.get(name)
    return found if isinstance(found, str) else ""
