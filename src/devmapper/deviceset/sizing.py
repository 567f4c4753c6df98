"""Making layers, those too that are larger than their parents and whose file systems have to grow.

moby registers the layer, then lets its file system grow, and leaves it behind as it is where that
fails (deviceset.go AddDevice, growFS).  Here it is marked as deleted until it is whole.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from devmapper.deviceset.activation import LayerMounts
from devmapper.deviceset.layer_options import check_size
from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.records import Extra, LayerRecord
from devmapper.deviceset.session import Graph
from devmapper.deviceset.steps import Step
from devmapper.errors import DevmapperError, LayerExists
from devmapper.linux.blockdev import opened
from devmapper.linux.growfs import grow
from devmapper.units import Bytes

log = logging.getLogger(__name__)


def create_layer(
    graph: Graph,
    mounts: LayerMounts,
    layer: LayerId,
    parent: LayerId,
    size: Bytes | None,
    *,
    extra: Extra = (),
    finish: Callable[[Path], None] | None = None,
) -> LayerRecord:
    """Make *layer* from *parent*, with its parent's size if *size* is None.

    Call with both layers held (L1).  The graph's lock is not held while the file system grows and
    *finish*, given the device, does the rest.  An error leaves no layer; a crash leaves one that is
    marked as deleted, which the next start removes.
    """
    with ExitStack() as stack:
        with graph.session() as session:
            if session.store.load(layer) is not None:
                raise LayerExists(layer)
            record = session.get(parent)
            if size is not None:
                check_size(size, record.size, file_name(parent))
            grows = size is not None and size != record.size
            if not grows and finish is None:
                return session.create_snap(layer, parent, record, extra=extra)
            wanted = record.size if size is None else size
            made = session.create_unfinished(layer, parent, record, wanted, extra=extra)
            stack.enter_context(_taken_back_on_error(graph, mounts, layer, made))
            # Another process that recovers meanwhile cannot remove a device that is open
            device = mounts.activate(session, layer, made)
            stack.enter_context(opened(device, os.O_RDONLY))
        if grows:
            grow(device)
        if finish is not None:
            finish(device)
        graph.checkpoint(Step.LAYER_GROWN)
        with graph.session() as session:
            completed = session.complete(layer, made)
    try:
        mounts.release(layer)
    except DevmapperError as err:
        log.info("layer %r stays active: %s", file_name(layer), err)
    return completed


@contextmanager
def _taken_back_on_error(
    graph: Graph, mounts: LayerMounts, layer: LayerId, made: LayerRecord
) -> Iterator[None]:
    """On an error the unfinished layer goes again.

    After an interruption that is no `Exception` the next session sees to that, as after a crash.
    """
    try:
        yield
    except Exception as err:
        try:
            mounts.release(layer)
            with graph.session() as session:
                if session.store.load(layer) == made:
                    session.delete(layer, made)
        except (DevmapperError, OSError) as other:
            err.add_note(f"it is left to the next start to remove what was made of it: {other}")
        raise
