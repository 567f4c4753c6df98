"""The root: an empty, committed snapshot, which those without a parent are made from.

containerd makes a file system for each of them.  Here it is a snapshot of the base layer, made
once, without the `lost+found` that mkfs leaves: an image's files are compared with what is there.
"""

import logging
import os
import time
from pathlib import Path
from typing import Final

from devmapper.deviceset.deviceset import Parts
from devmapper.deviceset.names import BASE, LayerId
from devmapper.deviceset.sizing import create_layer
from devmapper.errors import LayerExists, PoolMismatch
from devmapper.linux.blockdev import flush, probe_fs_type
from devmapper.linux.detached import mounted_detached
from devmapper.linux.fs_inodes import inodes_on
from devmapper.snapshots.index import ROOT_KEY, Entry
from devmapper.snapshots.model import Kind
from devmapper.snapshots.record import SnapshotRecord, decode, encode

log = logging.getLogger(__name__)

ROOT_LAYER: Final = LayerId("snapshot-root")
_LOST_FOUND: Final = "lost+found"
_MODE: Final = 0o755


def make_root(parts: Parts) -> Entry:
    """Make it, durably; `LayerExists` if another process was faster."""
    with parts.mounts.hold(ROOT_LAYER, BASE):
        if parts.graph.store.load(ROOT_LAYER) is not None:
            parts.deletions.make_way(ROOT_LAYER)  # what a crash has left of it
        now = time.time_ns()
        snapshot = SnapshotRecord(ROOT_KEY, Kind.COMMITTED, BASE, {}, now, now)
        record = create_layer(
            parts.graph,
            parts.mounts,
            ROOT_LAYER,
            BASE,
            None,
            extra=encode(snapshot),
            finish=_empty,
        )
    log.info("made the root of snapshots")
    return Entry.of(ROOT_LAYER, record, snapshot)


def find_root(parts: Parts) -> Entry | None:
    """The root as it is in the graph; None if there is none, or it is older than a larger base."""
    record = parts.graph.store.load(ROOT_LAYER)
    if record is None or record.deleted:
        return None
    snapshot = decode(record)
    if snapshot is None:
        raise PoolMismatch(
            f"layer {ROOT_LAYER!r} is not the root of snapshots",
            hint="it has been made by somebody else: devmapper rm removes it",
        )
    return Entry.of(ROOT_LAYER, record, snapshot)


def ensure_root(parts: Parts) -> Entry:
    """The root, made if it is missing, and made anew if the base layer has grown since."""
    found = find_root(parts)
    if found is not None:
        base = parts.graph.store.load(BASE)
        if base is None or base.size == found.record.size:
            return found
        log.info("the base layer has grown: the root of snapshots is made anew")
        parts.deletions.delete(ROOT_LAYER)
    try:
        return make_root(parts)
    except LayerExists:
        other = find_root(parts)
        if other is None:
            raise
        return other


def _empty(device: Path) -> None:
    """Take away what mkfs has left at the top; the root of containers is everybody's to enter."""
    fs_type = probe_fs_type(device)
    flags = ["nouuid"] if fs_type == "xfs" else []
    with mounted_detached(device, fs_type, flags=flags) as top:
        if _LOST_FOUND in os.listdir(top):
            os.rmdir(_LOST_FOUND, dir_fd=top)
        os.fchmod(top, _MODE)
        os.fsync(top)
    flush(device)
    log.debug("the root of snapshots has %d inodes in use", inodes_on(device))
