"""Layers as disks, for virtual machines: activated without a mount, or served over NBD.

A disk has one user at a time.  What is mounted here is not served, and what is served is not
mounted; who takes a block device to use it elsewhere has to see to that himself.
"""

import logging
import os
import stat
from pathlib import Path
from typing import Final, NamedTuple, Self

from devmapper.deviceset.activation import LayerMounts, check_not_served, disk_size
from devmapper.deviceset.busy import retry_while_busy, who_holds
from devmapper.deviceset.consistency import present_in_pool
from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.session import Graph, Session
from devmapper.engine.port import NbdExport
from devmapper.engine.runtime import directory_of
from devmapper.errors import DevmapperError, LayerBusy, ThinBusy

log = logging.getLogger(__name__)

_PATIENCE_SECONDS: Final = 1.0  # with who has a look in passing, such as udev


class _Socket(NamedTuple):
    """The socket of a service, as the one who made it remembers it."""

    path: Path
    read_only: bool
    identity: tuple[int, int] | None  # device and inode; None for one that has gone

    @classmethod
    def of(cls, export: NbdExport) -> Self:
        found = _look(export.socket)
        identity = None if found is None else (found.st_dev, found.st_ino)
        return cls(export.socket, export.read_only, identity)


class LayerDisks:
    """The disks of one graph.  Methods may be called from any thread, holding no lock.

    The services of an engine that is killed end with it.  The process that has given them out, or
    looked for them with `learn`, gives out again those for reading when it has started another
    engine.  A client that writes must see the end: what was answered and not flushed is lost, and
    one that came back by itself would take it for written.
    """

    def __init__(self, graph: Graph, mounts: LayerMounts) -> None:
        self._graph = graph
        self._mounts = mounts
        self._served: dict[LayerId, _Socket] = {}
        graph.on_revival.append(self._serve_again)

    def activate(self, layer: LayerId) -> Path:
        """The layer's block device, made if there is none; one that is served is `LayerBusy`."""
        with self._mounts.hold(layer):
            check_not_served(layer, self._mounts.info(layer))
            return retry_while_busy(lambda: self._activate(layer))

    def deactivate(self, layer: LayerId) -> bool:
        """Take the block device away, or end the service; whether there was one.

        In use: `LayerBusy` with its users, and nothing has changed.
        """
        with self._mounts.hold(layer):
            info = self._mounts.info(layer)
            if info is None:
                return False
            self._mounts.check_unused(layer)
            self._mounts.release(layer, seconds=_PATIENCE_SECONDS)
            self._served.pop(layer, None)
            return True

    def serve(self, layer: LayerId, socket: Path | None, *, read_only: bool) -> NbdExport:
        """Serve the layer over NBD; as it is served already, it stays.

        `LayerBusy` if it is mounted, has a block device or is served otherwise.
        """
        with self._mounts.hold(layer):
            info = self._mounts.info(layer)
            if info is not None and info.nbd is None:
                users = who_holds(info) or (f"its block device {info.path}",)
                raise LayerBusy(file_name(layer), users)
            with self._graph.session() as session:
                record = session.get(layer)
                try:
                    export = self._serve(session, layer, record, socket, read_only=read_only)
                except ThinBusy as err:
                    raise LayerBusy(file_name(layer), err.holders) from err
            self._served[layer] = _Socket.of(export)
            return export

    def learn(self) -> None:
        """Remember what is served already, by whatever process."""
        with self._graph.session() as session:
            found = {each.name: each.nbd for each in session.pool.devices() if each.nbd is not None}
            if not found:
                return
            for layer in session.store.layers():
                export = found.get(session.names.device(layer))
                if export is not None:
                    self._served[layer] = _Socket.of(export)

    def _serve(
        self,
        session: Session,
        layer: LayerId,
        record: LayerRecord,
        socket: Path | None,
        *,
        read_only: bool,
    ) -> NbdExport:
        with present_in_pool(layer, record.thin_id):
            return session.pool.serve_nbd(
                self._graph.names.device(layer),
                record.thin_id,
                disk_size(record),
                socket,
                read_only=read_only,
            )

    def _serve_again(self, session: Session) -> None:
        """Give out the services for reading that an engine has taken with it, tell of the others.

        An error keeps no other one.
        """
        for layer, before in tuple(self._served.items()):
            record = session.find(layer)
            left = _look(before.path)
            if record is None or not self._was_served(before, left):
                self._served.pop(layer, None)
                continue
            if not before.read_only:
                self._served.pop(layer, None)
                log.warning(
                    "layer %r is not served over NBD any more: its machine may have lost what it"
                    " has not flushed; end the machine, then serve the layer again",
                    file_name(layer),
                )
                continue
            try:
                export = self._serve(session, layer, record, before.path, read_only=True)
                if left is not None and (left.st_uid, left.st_gid) != (os.geteuid(), os.getegid()):
                    os.chown(export.socket, left.st_uid, left.st_gid, follow_symlinks=False)
            except (DevmapperError, OSError) as err:
                log.warning("layer %r is not served over NBD again: %s", file_name(layer), err)
                continue
            self._served[layer] = _Socket.of(export)
            log.warning("layer %r is served over NBD again on %s", file_name(layer), before.path)

    def _was_served(self, before: _Socket, left: os.stat_result | None) -> bool:
        """Whether the engine's end has ended the service, and nobody else before.

        Who ends a service removes its socket, and an engine that is killed leaves it behind, except
        where the engine has chosen the place: its directory goes with it.
        """
        if left is None:
            return before.path.parent == directory_of(self._graph.names.pool)
        return before.identity == (left.st_dev, left.st_ino)

    def _activate(self, layer: LayerId) -> Path:
        with self._graph.session() as session:
            return self._mounts.activate(session, layer, session.get(layer))


def _look(path: Path) -> os.stat_result | None:
    """The socket at *path*; None if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found if stat.S_ISSOCK(found.st_mode) else None
