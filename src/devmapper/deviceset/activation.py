"""Layers as mounted file systems: activate, mount, count, unmount, deactivate.

What is active and mounted is asked of the system.  Only the number of users inside this process is
counted here, and it starts from what is mounted already: a layer that another command mounted has
one user, its mount.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from devmapper.deviceset.busy import BUSY_TIMEOUT_SECONDS, deactivate, retry_while_busy
from devmapper.deviceset.keyed_lock import KeyedLock
from devmapper.deviceset.mountopts import mount_options
from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.session import Graph, Session
from devmapper.engine.port import Activation, DeviceInfo
from devmapper.errors import LayerBusy, LayerNotMounted, MountFailed, ThinBusy
from devmapper.linux import blockdev, holders, mount
from devmapper.units import SECTOR_SIZE, Bytes

log = logging.getLogger(__name__)

_UNMOUNT_SECONDS: Final = 1.0


class LayerMounts:
    """Mounts of the layers of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._locks: KeyedLock[LayerId] = KeyedLock()
        self._users: dict[LayerId, int] = {}
        self._mount_points = Path(os.path.realpath(graph.home)) / "mnt"

    @contextmanager
    def hold(self, *layers: LayerId) -> Iterator[None]:
        """Keep the other threads of this process from these layers."""
        with self._locks.hold(*layers):
            yield

    def mount(self, layer: LayerId, path: Path, label: str) -> int:
        """Mount *layer* on *path*, or count one more user; returns how many there are now.

        On an error the layer is as it was.
        """
        with self.hold(layer):
            place = self.mount_point(layer)
            if place is not None:
                if not _same_place(place, path):
                    raise LayerBusy(file_name(layer), [f"a mount at {str(place)!r}"])
                users = max(1, self._users.get(layer, 1)) + 1
            else:
                self._activate_and_mount(layer, path, label)
                users = 1
            self._users[layer] = users
            return users

    def unmount(self, layer: LayerId) -> int:
        """Take one user away; the last one unmounts and deactivates.  Returns how many are left.

        Busy: `LayerBusy` after a second, and everything stays as it was, so that it can be tried
        again.
        """
        with self.hold(layer):
            place = self.mount_point(layer)
            if place is None:
                self._users.pop(layer, None)
                if not self._deactivate(layer):
                    raise LayerNotMounted(file_name(layer))
                return 0
            left = max(1, self._users.get(layer, 1)) - 1
            if left > 0:
                self._users[layer] = left
                return left
            self._unmount(layer, place)
            self._users.pop(layer, None)
            self._deactivate(layer)
            return 0

    def mount_point(self, layer: LayerId) -> Path | None:
        """Where the layer is mounted now."""
        info = self.info(layer)
        if info is None or info.open_count == 0:  # a mount is a user
            return None
        try:
            number = blockdev.device_number(info.path)
        except FileNotFoundError:
            return None  # it went meanwhile
        # The table of mounts is long where there are many layers: first where it ought to be
        usual = self._mount_points / layer
        if layer and mount.is_mount_of(usual, number):
            return usual
        places = mount.mounts_of(number)
        return places[0].mount_point if places else None

    def info(self, layer: LayerId) -> DeviceInfo | None:
        """The layer's device if it is active."""
        return self._graph.pool.info(self._graph.names.device(layer))

    def activate(self, session: Session, layer: LayerId, record: LayerRecord) -> Path:
        """Make the layer's block device; one that is there already is returned as it is."""
        name = self._graph.names.device(layer)
        info = session.pool.info(name)
        if info is not None and info.state is Activation.LEAVING:
            session.pool.cancel_deferred(name)
        # A device consists of whole sectors; dm.basesize need not (moby divides by 512 as well)
        whole = Bytes(record.size - record.size % SECTOR_SIZE)
        return session.pool.activate(name, record.thin_id, whole)

    def check_unused(self, layer: LayerId) -> None:
        """`LayerBusy`, which names the holders, if somebody uses the layer's device."""
        info = self.info(layer)
        if info is None:
            return
        if info.open_count > 0 or self.mount_point(layer) is not None:
            raise LayerBusy(file_name(layer), _holders(info.path))

    def release(self, layer: LayerId, *, seconds: float = BUSY_TIMEOUT_SECONDS) -> None:
        """Deactivate a device that nobody should use any more."""
        try:
            deactivate(self._graph.pool, self._graph.names.device(layer), seconds=seconds)
        except ThinBusy as err:
            raise self._busy(layer) from err

    def forget(self) -> None:
        """Nobody in this process uses a mount any more."""
        self._users.clear()

    def _activate_and_mount(self, layer: LayerId, path: Path, label: str) -> None:
        was_active = self.info(layer) is not None
        with self._graph.session() as session:
            device = self.activate(session, layer, session.get(layer))
            # While this descriptor is open nobody can deactivate the device, and so its node
            # cannot become another layer's before it is mounted
            pin = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        mounted = False
        try:
            self._mount(layer, device, path, label)
            mounted = True
        finally:
            os.close(pin)
            if not mounted and not was_active:
                self._undo_activation(layer)

    def _mount(self, layer: LayerId, device: Path, path: Path, label: str) -> None:
        if mount.is_mount_root(path):
            raise LayerBusy(file_name(layer), [f"another mount at {str(path)!r}"])
        try:
            fs_type = blockdev.probe_fs_type(device)
            options = mount_options(fs_type, self._graph.options.mount_options, label)
            mount.mount(device, path, fs_type, flags=options.flags, data=options.data)
        except OSError as err:
            raise MountFailed(file_name(layer), path, err.strerror or str(err)) from err

    def _undo_activation(self, layer: LayerId) -> None:
        try:
            deactivate(self._graph.pool, self._graph.names.device(layer))
        except ThinBusy as err:
            log.warning("layer %r could not be mounted and stays active: %s", file_name(layer), err)

    def _unmount(self, layer: LayerId, place: Path) -> None:
        """Unmount for good: moby detaches lazily, which leaves the device busy and unseen."""
        try:
            retry_while_busy(lambda: mount.unmount(place), seconds=_UNMOUNT_SECONDS)
        except OSError as err:
            if err.errno == errno.EBUSY:
                raise self._busy(layer) from err
            raise

    def _deactivate(self, layer: LayerId) -> bool:
        """Whether there was something to deactivate."""
        if self.info(layer) is None:
            return False
        name = self._graph.names.device(layer)
        deferred = self._graph.options.use_deferred_removal
        try:
            deactivate(self._graph.pool, name, deferred=deferred)
        except ThinBusy as err:
            raise self._busy(layer) from err
        return True

    def _busy(self, layer: LayerId) -> LayerBusy:
        info = self.info(layer)
        return LayerBusy(file_name(layer), _holders(info.path) if info else ())


def _holders(device: Path) -> list[str]:
    try:
        return holders.holders(device)
    except OSError:
        return []


def _same_place(place: Path, path: Path) -> bool:
    return os.path.realpath(path) == str(place)
