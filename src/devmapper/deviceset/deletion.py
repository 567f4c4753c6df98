"""Deleting layers: at once where nobody uses them, else as soon as that has an end.

A layer that is on its way out has a record that says `"deleted":true`, which is Docker's mark too:
it exists for nobody any more.  What is left to do is done by whoever comes first: the call that
made the mark, the next start, a worker, the `put` of the last user, or who wants the id again.
"""

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from enum import StrEnum
from typing import Final

from devmapper.deviceset.activation import LayerMounts
from devmapper.deviceset.names import BASE, LayerId, file_name
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.session import Graph
from devmapper.deviceset.steps import Step
from devmapper.deviceset.worker import Stopping
from devmapper.engine.port import Activation
from devmapper.errors import (
    DevmapperError,
    LayerBusy,
    LayerExists,
    LayerNotFound,
    RecordCorrupt,
    ThinBusy,
)

log = logging.getLogger(__name__)

DELETION_INTERVAL_SECONDS: Final = 30.0  # as moby's worker
_PATIENCE_SECONDS: Final = 0.5  # with a device that may be put off
_CLOCK_STEP_NS: Final = 1_000_000_000  # more than the times of files are apart


class Deletion(StrEnum):
    """How far a deletion has come when the call returns."""

    DONE = "done"
    PUT_OFF = "put off"  # the layer does not exist any more, its blocks are not free yet


def never() -> bool:
    """For work that goes on to its end."""
    return False


class Deletions:
    """The deletions of one graph.  Methods may be called from any thread, holding no lock."""

    def __init__(self, graph: Graph, mounts: LayerMounts) -> None:
        self._graph = graph
        self._mounts = mounts
        self._deferred = graph.options.use_deferred_deletion
        self._known: tuple[int, list[LayerId]] | None = None

    def delete(self, layer: LayerId) -> Deletion:
        """Delete a layer.

        One that is in use is `LayerBusy`, and nothing was changed; with dm.use_deferred_deletion
        the deletion is put off instead.  A mounted layer is busy at once, a device that is only
        open may be a passing one's (udev), which is waited for.
        """
        with self._mounts.hold(layer):
            found = self._graph.store.load(layer)
            if found is None or found.deleted:
                raise LayerNotFound(file_name(layer))
            idle = self._let_go(layer)
            with self._graph.session() as session:
                record = session.get(layer)
                if idle and self._mounts.info(layer) is not None:
                    # Another process has activated it since: it is in use
                    if not self._deferred:
                        raise self._mounts.busy(layer)
                    idle = False
                at_once = idle and not self._graph.options.discard_on_delete
                if at_once:
                    session.delete(layer, record)
                else:
                    session.doom(layer, record)
            if at_once:
                self._mounts.forget_layer(layer)
                log.info("deleted layer %r", file_name(layer))
                return Deletion.DONE
            if idle:
                return self._complete(layer)
            self._defer_removal(layer)
            return Deletion.PUT_OFF

    def make_way(self, layer: LayerId) -> None:
        """For who wants the id of a layer that is on its way out; call while holding the layer.

        `LayerExists` if it still cannot go.  moby refuses in any case until its worker was there.
        """
        if self._is_doomed(layer) and self._complete(layer) is Deletion.PUT_OFF:
            raise LayerExists(file_name(layer), deleted=True)

    def doomed(self) -> list[LayerId]:
        """The layers on their way out, without the base layer, whose own start decides about it.

        Records are read if something in their directory has changed since the last time.
        """
        now = time.time_ns()
        changed = self._graph.store.directory.stat().st_mtime_ns
        if self._known is None or self._known[0] != changed:
            layers = self._graph.store.layers()
            found = [layer for layer in layers if layer != BASE and self._is_doomed(layer)]
            # A change within one tick of the clock would not show
            self._known = (changed, found) if changed < now - _CLOCK_STEP_NS else None
            return found
        return list(self._known[1])

    def complete_all(self, stopping: Stopping = never) -> bool:
        """Try to delete whatever is on its way out; whether something still is.

        Errors of one layer do not keep the others.
        """
        return self.complete(self.doomed(), stopping)

    def complete(self, layers: Iterable[LayerId], stopping: Stopping = never) -> bool:
        """As `complete_all`, for these layers."""
        left = False
        for layer in layers:
            if stopping():
                return True
            try:
                with self._mounts.hold(layer):
                    left |= self._complete(layer) is Deletion.PUT_OFF
            except (DevmapperError, OSError) as err:
                log.warning("layer %r cannot be deleted now: %s", layer, err)
                left = True
        return left

    def _let_go(self, layer: LayerId) -> bool:
        """Deactivate the device; False if it is in use and the deletion may be put off."""
        try:
            self._mounts.check_unused(layer)
            if self._deferred:
                self._mounts.release(layer, seconds=_PATIENCE_SECONDS)
            else:
                self._mounts.release(layer)
        except LayerBusy:
            if not self._deferred:
                raise
            return False
        return True

    def _defer_removal(self, layer: LayerId) -> None:
        try:
            self._mounts.defer(layer)
        except (DevmapperError, OSError) as err:
            # The mark is durable: whoever completes the deletion tries this again
            log.warning("layer %r: its device stays active: %s", file_name(layer), err)
            return
        self._graph.checkpoint(Step.REMOVAL_DEFERRED)
        log.info("layer %r is in use: it is deleted when its last user is gone", file_name(layer))

    def _is_doomed(self, layer: LayerId) -> bool:
        try:
            record = self._graph.store.load(layer)
        except RecordCorrupt as err:
            log.warning("%s", err)  # it does not keep the others
            return False
        return record is not None and record.deleted

    def _complete(self, layer: LayerId) -> Deletion:
        """Delete a layer that is marked; call while holding the layer."""
        record = self._graph.store.load(layer)
        if record is None or not record.deleted:
            return Deletion.DONE  # another process was faster
        info = self._mounts.info(layer)
        if info is not None and info.open_count > 0 and info.state is Activation.LEAVING:
            return Deletion.PUT_OFF
        try:
            self._mounts.release(layer, seconds=_PATIENCE_SECONDS)
            if self._graph.options.discard_on_delete:
                self._discard(layer, record)
                self._mounts.release(layer)
            with self._graph.session() as session:
                record = session.store.load(layer)
                if record is not None and record.deleted:
                    session.delete(layer, record)
        except (LayerBusy, ThinBusy) as err:
            log.info("layer %r goes as soon as its device is free: %s", file_name(layer), err)
            if self._graph.options.use_deferred_removal:
                with suppress(DevmapperError, OSError):  # tried again the next time
                    self._mounts.defer(layer)
            return Deletion.PUT_OFF
        self._mounts.forget_layer(layer)
        log.info("deleted layer %r", file_name(layer))
        return Deletion.DONE

    def _discard(self, layer: LayerId, record: LayerRecord) -> None:
        """Give the blocks back to what is below the pool.

        A wish, as in moby: errors are only logged.  Nobody uses the device, which was not active
        before.
        """
        try:
            with self._graph.session() as session:
                self._mounts.activate(session, layer, record)
            self._graph.pool.discard_device(self._graph.names.device(layer))
            self._graph.checkpoint(Step.THIN_DISCARDED)
        except (DevmapperError, OSError) as err:
            log.info("layer %r was not discarded: %s", file_name(layer), err)
