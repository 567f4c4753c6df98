"""Layers as disks, for virtual machines: activated without a mount, or served over NBD.

A disk has one user at a time.  What is mounted here is not served, and what is served is not
mounted; who takes a block device to use it elsewhere has to see to that himself.
"""

from pathlib import Path
from typing import Final

from devmapper.deviceset.activation import LayerMounts, check_not_served, disk_size
from devmapper.deviceset.busy import retry_while_busy, who_holds
from devmapper.deviceset.consistency import present_in_pool
from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.session import Graph
from devmapper.engine.port import NbdExport
from devmapper.errors import LayerBusy, ThinBusy

_PATIENCE_SECONDS: Final = 1.0  # with who has a look in passing, such as udev


class LayerDisks:
    """The disks of one graph.  Methods may be called from any thread, holding no lock."""

    def __init__(self, graph: Graph, mounts: LayerMounts) -> None:
        self._graph = graph
        self._mounts = mounts

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
                    with present_in_pool(layer, record.thin_id):
                        return session.pool.serve_nbd(
                            self._graph.names.device(layer),
                            record.thin_id,
                            disk_size(record),
                            socket,
                            read_only=read_only,
                        )
                except ThinBusy as err:
                    raise LayerBusy(file_name(layer), err.holders) from err

    def _activate(self, layer: LayerId) -> Path:
        with self._graph.session() as session:
            return self._mounts.activate(session, layer, session.get(layer))
