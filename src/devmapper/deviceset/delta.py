"""Where the devices of two mounted layers may differ: what a comparison of their trees starts from.

The pool knows only what has reached the devices, so each file system is flushed to its device
first: frozen, which empties its journal, and thawed at once.  Which layer came from which does not
matter.
"""

import logging
import os
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.deviceset.activation import LayerMounts
from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.session import Graph
from devmapper.engine.port import Activation, ChangedRange, DeviceInfo, PoolMode
from devmapper.errors import DevmapperError
from devmapper.linux import libc
from devmapper.linux.blockdev import opened

log = logging.getLogger(__name__)

# Below that, looking at each file is cheaper than to flush two file systems
FEWEST_INODES: Final = 1000


class LayerDelta(NamedTuple):
    """The block devices of two layers, and where they may differ."""

    new_device: Path
    old_device: Path
    changed: list[ChangedRange]


def layer_delta(graph: Graph, mounts: LayerMounts, new: LayerId, old: LayerId) -> LayerDelta | None:
    """Flush two layers, which are mounted, and ask the pool.

    None where that is not worth its while or cannot be done: few files, a layer that is leaving or
    cannot be flushed, a pool that is out of space or read-only (a flush would wait or fail).
    Whatever is written to a layer after it was flushed may be missing.  A layer that cannot be
    resumed or thawed is an error.
    """
    layers = list(dict.fromkeys((new, old)))
    try:
        if graph.pool.status().mode is not PoolMode.WRITE:
            return None
        found = {layer: graph.pool.info(graph.names.device(layer)) for layer in layers}
        suspended = [layer for layer in layers if _state(found[layer]) is Activation.SUSPENDED]
    except (DevmapperError, OSError) as err:
        _say_why(new, err)
        return None
    for layer in suspended:
        mounts.flush(layer)  # resumes it if who suspended it was killed: nothing could be read
    ours, theirs = found[new], found[old]
    if ours is None or theirs is None or Activation.LEAVING in (ours.state, theirs.state):
        return None
    try:
        if _is_small(mounts, new):
            return None
        for layer in layers:
            _write_back(mounts, layer)
    except (DevmapperError, OSError) as err:
        _say_why(new, err)
        return None
    if not all(mounts.flush(layer) for layer in layers):
        return None
    try:
        changed = graph.pool.changed_ranges(ours.thin_id, theirs.thin_id)
    except (DevmapperError, OSError) as err:
        _say_why(new, err)
        return None
    return LayerDelta(ours.path, theirs.path, changed)


def _say_why(layer: LayerId, err: Exception) -> None:
    log.debug("layer %r: each file is looked at: %s", file_name(layer), err)


def _state(info: DeviceInfo | None) -> Activation:
    return Activation.ABSENT if info is None else info.state


def _is_small(mounts: LayerMounts, layer: LayerId) -> bool:
    place = mounts.mount_point(layer)
    if place is None:
        return True
    found = os.statvfs(place)
    return found.f_files - found.f_ffree < FEWEST_INODES


def _write_back(mounts: LayerMounts, layer: LayerId) -> None:
    """Write what can be written before the layer stands still, so that it does not for long."""
    place = mounts.mount_point(layer)
    if place is not None:
        with opened(place, os.O_RDONLY | os.O_DIRECTORY) as fd:
            libc.syncfs(fd)
