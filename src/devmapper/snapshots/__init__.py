"""Snapshots as containerd means them: named, labelled layers that somebody else mounts."""

from devmapper.snapshots.model import Info, Kind, Mount, Usage
from devmapper.snapshots.snapshots import Snapshots

__all__ = ["Info", "Kind", "Mount", "Snapshots", "Usage"]
