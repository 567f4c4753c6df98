"""Layers as mounted file systems: activate, mount, count, unmount, deactivate.

What is active and mounted is asked of the system.  Only its users are counted (`users.py`), and
that starts from what is mounted already: a layer that another command mounted has one user, its
mount.
"""

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from devmapper.deviceset.busy import (
    BUSY_TIMEOUT_SECONDS,
    deactivate,
    retry_while_busy,
    who_holds,
)
from devmapper.deviceset.consistency import present_in_pool
from devmapper.deviceset.keyed_lock import KeyedLock
from devmapper.deviceset.mounting import mention_label, mount_layer
from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.process_locks import ProcessLocks
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.session import Graph, Session
from devmapper.deviceset.users import SOMEBODY, Users, take_back
from devmapper.engine.port import Activation, DeviceInfo
from devmapper.engine.runtime import runtime_base
from devmapper.errors import (
    DevmapperError,
    LayerBusy,
    LayerNotMounted,
    ThinBusy,
)
from devmapper.linux import blockdev, mount
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.holders import stacked_devices
from devmapper.units import SECTOR_SIZE, Bytes

log = logging.getLogger(__name__)

_UNMOUNT_SECONDS: Final = 1.0


class LayerMounts:
    """Mounts of the layers of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._locks: KeyedLock[LayerId] = KeyedLock()
        self._elsewhere = ProcessLocks(runtime_base() / f".lock-{graph.names.prefix}-layers")
        self._users = Users(runtime_base() / f"{graph.names.prefix}-users")
        self._mount_points = Path(os.path.realpath(graph.home)) / "mnt"
        graph.on_revival.append(self._tell_lost)

    @contextmanager
    def hold(self, *layers: LayerId) -> Iterator[None]:
        """Keep the other threads of this process from these layers."""
        with self._locks.hold(*layers):
            yield

    @contextmanager
    def _hold_everywhere(self, layer: LayerId) -> Iterator[None]:
        """Keep everybody, also other processes, from mounting and unmounting the layer."""
        with self.hold(layer), self._elsewhere.hold(layer):
            yield

    def mount(
        self,
        layer: LayerId,
        path: Path,
        label: str,
        *,
        user: str = SOMEBODY,
        once: bool = False,
        make_place: Callable[[], object] = lambda: None,
    ) -> int:
        """Mount *layer* on *path*, or count one more user; returns how many there are now.

        *make_place* makes the directory *path* before, where nobody can remove it again meanwhile.
        With *once* a *user* who has it mounted is not counted again.  On an error the layer is as
        it was.
        """
        with self._hold_everywhere(layer):
            info = self.info(layer)
            place = self._place(layer, info)
            if place is not None:
                if not _same_place(place, path):
                    raise LayerBusy(file_name(layer), [f"a mount at {str(place)!r}"])
                mention_label(layer, place, label)
                if info is not None and info.state is Activation.SUSPENDED:
                    self.flush(layer)  # whoever suspended it may have been killed: resumes it
                users = self._users.of(layer)
                if not (once and users[user]):
                    users[user] += 1
            else:
                check_not_served(layer, info)
                make_place()
                try:
                    self._activate_and_mount(layer, info, path, label)
                except BaseException:
                    if _same_place(self._mount_points / layer, path):
                        self.remove_mount_point(layer)
                    raise
                users = Counter({user: 1})
            self._users.set(layer, users)
            return users.total()

    def unmount(self, layer: LayerId, *, user: str = SOMEBODY) -> int:
        """Take one use away; the last one unmounts and deactivates.  Returns how many are left.

        Busy: `LayerBusy` after a second, and everything stays as it was, so that it can be tried
        again; at once, where only others than *user* use it.
        """
        with self._hold_everywhere(layer):
            info = self.info(layer)
            place = self._place(layer, info)
            if info is None or place is None:
                self._users.drop(layer)
                if info is None or info.state is Activation.LEAVING or info.nbd is not None:
                    raise LayerNotMounted(file_name(layer))
                self._deactivate(layer, info)  # what an earlier call could not do
                self.remove_mount_point(layer)
                return 0
            users = self._users.of(layer)
            if not take_back(users, user):
                raise LayerBusy(file_name(layer), sorted(+users))
            if users.total() > 0:
                self._users.set(layer, users)
                return users.total()
            self._unmount(layer, place)
            self._users.drop(layer)
            self._deactivate(layer, info)
            return 0

    def users(self, layer: LayerId) -> Mapping[str, int]:
        """Who uses the layer's mount, by name; empty if it is not mounted."""
        with self._hold_everywhere(layer):
            if self._place(layer, self.info(layer)) is None:
                return {}
            return dict(self._users.of(layer))

    def used_by(self, user: str) -> list[LayerId]:
        """The layers that *user* has mounted."""
        return [layer for layer in self._users.layers_of(user) if self.users(layer).get(user)]

    def count_once(self, layer: LayerId, user: str) -> None:
        """However often *user* was counted, once it is from now on."""
        with self._hold_everywhere(layer):
            users = self._users.of(layer)
            if users[user] > 1:
                users[user] = 1
                self._users.set(layer, users)

    def mount_point(self, layer: LayerId) -> Path | None:
        """Where the layer is mounted now."""
        return self._place(layer, self.info(layer))

    def _tell_lost(self, _session: Session) -> None:
        """Name the mounts that an engine has taken with it, and who was counted on them."""
        for layer in self._users.layers():
            if not mount.is_mount_point(self._mount_points / layer):
                users = ", ".join(sorted(self._users.of(layer)))
                log.warning(
                    "layer %r was mounted for %s and is not any more: its device has gone with the"
                    " engine; what uses it has to mount it again",
                    file_name(layer),
                    users,
                )

    def _place(self, layer: LayerId, info: DeviceInfo | None) -> Path | None:
        if info is None or info.open_count == 0:  # a mount is a user
            return None
        if (number := number_of(info)) is None:
            return None
        # The table of mounts is long where there are many layers: first where it ought to be
        usual = self._mount_points / layer
        if layer and mount.is_mount_of(usual, number):
            return usual
        places = mount.mounts_of(number)
        return places[0].mount_point if places else None

    def info(self, layer: LayerId) -> DeviceInfo | None:
        """The layer's device if it is active; what most operations begin with."""
        name = self._graph.names.device(layer)
        return self._graph.ask(lambda pool: pool.info(name))

    def flush(self, layer: LayerId) -> bool:
        """Let all that is dirty reach the device in its place: suspend it, and resume it at once.

        False if it could not be suspended.  `EngineError` or `OSError` if it cannot be resumed.
        """
        suspended = False
        try:
            with self._graph.pool.suspended(self._graph.names.device(layer)):
                suspended = True
        except (DevmapperError, OSError) as err:
            if suspended:
                raise  # nothing is worse
            log.warning("layer %r cannot be flushed: %s", file_name(layer), err)
        return suspended

    def activate(self, session: Session, layer: LayerId, record: LayerRecord) -> Path:
        """Make the layer's block device; one that is there already is returned as it is."""
        name = self._graph.names.device(layer)
        whole = disk_size(record)
        with present_in_pool(layer, record.thin_id):
            try:
                return session.pool.activate(name, record.thin_id, whole)
            except ThinBusy:  # it is LEAVING: asked only then, for most are not
                session.pool.cancel_deferred(name)
                return session.pool.activate(name, record.thin_id, whole)

    def check_unused(self, layer: LayerId) -> None:
        """`LayerBusy`, which names the holders, if the layer is mounted or something stands on it.

        Whoever merely has the device open, such as udev, may be gone in a moment: `release` waits.
        """
        info = self.info(layer)
        if info is not None and info.open_count > 0 and _is_claimed(info.path):
            raise LayerBusy(file_name(layer), who_holds(info))

    def release(self, layer: LayerId, *, seconds: float = BUSY_TIMEOUT_SECONDS) -> None:
        """Deactivate a device that nobody should use any more."""
        try:
            deactivate(self._graph.pool, self._graph.names.device(layer), seconds=seconds)
        except ThinBusy as err:
            raise self.busy(layer) from err

    def defer(self, layer: LayerId) -> None:
        """Let a device that is in use go away with its last user."""
        self._graph.pool.deactivate(self._graph.names.device(layer), deferred=True)

    def busy(self, layer: LayerId) -> LayerBusy:
        """The error that names who uses the layer's device."""
        info = self.info(layer)
        return LayerBusy(file_name(layer), who_holds(info) if info else ())

    def remove_mount_point(self, layer: LayerId) -> None:
        """Remove the directory below `mnt`, which moby 1.7 leaves behind.

        Call while holding the layer, or it goes between the moments when somebody else makes it
        and mounts on it.
        """
        try:
            (self._mount_points / layer).rmdir()
        except FileNotFoundError:
            pass
        except OSError as err:  # mounted after all, or it holds what somebody put there
            log.debug("mount point of layer %r stays: %s", file_name(layer), err.strerror)

    def forget_layer(self, layer: LayerId) -> None:
        """The layer does not exist any more: nothing of its mount stays.

        Call while holding it.  Another process may have made one of the same id already.
        """
        with self._elsewhere.hold(layer):
            if self._place(layer, self.info(layer)) is None:
                self._users.drop(layer)
                self.remove_mount_point(layer)

    def tidy_users(self) -> None:
        """Nobody uses layers that are not mounted, whatever a killed process has left."""
        self._users.tidy()
        for layer in self._users.layers():
            with self._hold_everywhere(layer):  # or somebody mounts it before they are dropped
                if self._place(layer, self.info(layer)) is None:
                    self._users.drop(layer)

    def forget(self) -> None:
        """Nobody in this process uses a mount any more."""
        self._users.forget()

    def _activate_and_mount(
        self, layer: LayerId, before: DeviceInfo | None, path: Path, label: str
    ) -> None:
        device, pin = retry_while_busy(lambda: self._activate_and_open(layer))
        mounted = False
        try:
            mount_layer(layer, device, path, self._graph.options, label)
            mounted = True
        finally:
            os.close(pin)
            if not mounted and (before is None or before.state is Activation.LEAVING):
                self._undo_activation(layer, deferred=before is not None)

    def _activate_and_open(self, layer: LayerId) -> tuple[Path, int]:
        """The device, and a descriptor for it.

        While that is open nobody can deactivate the device, and so its node cannot become another
        layer's before it is mounted.  `ThinBusy` if the device is just going away.
        """
        with self._graph.session() as session:
            device = self.activate(session, layer, session.get(layer))
            return device, os.open(device, os.O_RDONLY | os.O_CLOEXEC)

    def _undo_activation(self, layer: LayerId, *, deferred: bool) -> None:
        try:
            deactivate(self._graph.pool, self._graph.names.device(layer), deferred=deferred)
        except ThinBusy as err:
            log.warning("layer %r could not be mounted and stays active: %s", file_name(layer), err)

    def _unmount(self, layer: LayerId, place: Path) -> None:
        """Unmount for good: moby detaches lazily, which leaves the device busy and unseen.

        Removing the mount point then unmounts the copies that other mount namespaces have of it
        (Linux 3.18; moby does it since 17.12): what leaks into a container does not keep the
        device.  A directory that a caller has chosen is his own and stays.
        """
        try:
            retry_while_busy(lambda: mount.unmount(place), seconds=_UNMOUNT_SECONDS)
        except OSError as err:
            if err.errno == errno.EBUSY:
                raise self.busy(layer) from err
            raise
        if place == self._mount_points / layer:
            self.remove_mount_point(layer)

    def _deactivate(self, layer: LayerId, info: DeviceInfo) -> None:
        """Deactivate a layer that was unmounted; one that is LEAVING goes by itself."""
        if info.state is Activation.LEAVING:
            return
        deferred = self._graph.options.use_deferred_removal
        try:
            deactivate(self._graph.pool, info.name, deferred=deferred)
        except ThinBusy as err:
            raise self.busy(layer) from err


def number_of(info: DeviceInfo) -> DeviceNumber | None:
    """The number of an active block device; None if it went meanwhile, or never was one."""
    try:
        return blockdev.device_number(info.path)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENOTBLK):
            return None
        raise


def disk_size(record: LayerRecord) -> Bytes:
    """A device has whole sectors; dm.basesize need not (moby divides by 512 as well)."""
    return Bytes(record.size - record.size % SECTOR_SIZE)


def check_not_served(layer: LayerId, info: DeviceInfo | None) -> None:
    """`LayerBusy` for a layer that is served over NBD: a file system has one user, or is lost."""
    if info is not None and info.nbd is not None:
        users = info.nbd.clients or (f"its NBD socket {str(info.nbd.socket)!r}",)
        raise LayerBusy(file_name(layer), users)


def _is_claimed(path: Path) -> bool:
    """Whether a device is mounted or another one stands on it.

    The kernel's count of opens does not tell these from a program that looks in passing.  Where an
    engine has files instead of devices nobody does.
    """
    if not blockdev.is_block_device(path):
        return True
    number = blockdev.device_number(path)
    return bool(mount.mounts_of(number) or stacked_devices(number))


def _same_place(place: Path, path: Path) -> bool:
    return os.path.realpath(path) == str(place)
