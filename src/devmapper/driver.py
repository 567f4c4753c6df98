"""The graph driver: layers as directories.

What Docker calls when it makes, mounts, compares and removes layers, with what its `Init` wraps
around it: the differences between two layers as a tar.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self

from devmapper.deviceset.deletion import Deletion
from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.home import PrivateHome
from devmapper.deviceset.id_maps import IdMap, container_root
from devmapper.deviceset.layer_options import parse_layer_options
from devmapper.deviceset.layer_root import ROOTFS, make_owned, prepare_root
from devmapper.deviceset.names import LayerId, file_name, layer_id
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.status import rows
from devmapper.engine.port import Engine
from devmapper.errors import LayerNotFound
from devmapper.layerdiff.ids import IDENTITY, Ids
from devmapper.linux import blockdev, libc, mount
from devmapper.linux.blockdev import opened

if TYPE_CHECKING:
    from devmapper.engine.select import Preference
    from devmapper.layerdiff.changes import Change
    from devmapper.layerdiff.inode_ranges import InodeSet

log = logging.getLogger(__name__)


def init_mapped(
    home: Path | str,
    options: Iterable[str],
    *,
    engine: "Preference | Engine",
    id_maps: Iterable[IdMap],
) -> "Driver":
    """As `init`, with the same maps for users and groups, as settings have them."""
    maps = tuple(id_maps)
    return init(home, options, engine=engine, uid_maps=maps, gid_maps=maps)


def init(
    home: Path | str,
    options: Iterable[str] = (),
    *,
    engine: "Preference | Engine" = "auto",
    uid_maps: Iterable[IdMap] = (),
    gid_maps: Iterable[IdMap] = (),
) -> "Driver":
    """Open the graph in *home*, making what is missing; the seed's `Init`.

    *engine* is which one to use: "auto", "kernel" or "embedded", or one that the caller has made.
    With maps of a user namespace (`deviceset.id_maps.IdMap`) the home, mount points and the root
    of each layer belong to the container's root, and tars of layers hold the container's ids;
    `UsageError`, before anything is touched, for maps without a root.  Errors are those of
    `DeviceSet` and `EnvironmentLacking`.  moby `driver.go` Init.
    """
    uid_maps, gid_maps = tuple(uid_maps), tuple(gid_maps)
    root = container_root(uid_maps, gid_maps)
    devices = DeviceSet(home, options, engine=_engine(engine), owner=root)
    return Driver(devices, ids=Ids(uid_maps, gid_maps))


def mounted(path: Path | str) -> bool:
    """Whether another file system begins at *path*; one that is not there is not mounted.

    `OSError` if it cannot be looked at.  moby `mount.go` Mounted.
    """
    return mount.mounted(Path(path))


def probe_fs_type(device: Path | str) -> str:
    """Kind of the file system on *device*: btrfs, ext4 or xfs.

    `OSError`: EIO if it is shorter than 65,608 bytes, EINVAL if it has none of them.  moby
    `mount.go` ProbeFsType.
    """
    return blockdev.probe_fs_type(Path(device))


class LayerUsage(NamedTuple):
    """What one layer takes in the pool."""

    id: str
    thin_id: int
    size: int  # bytes, as all of these
    mapped: int
    exclusive: int  # comes back when the layer is removed
    shared: int


class Driver:
    """An open graph driver; every method may be called from any thread."""

    def __init__(self, devices: DeviceSet, *, ids: Ids = IDENTITY) -> None:
        """*ids*: what ids in tars are on disk; their root is to be the owner of *devices*."""
        self.devices = devices
        self.ids = ids
        self._private_home = PrivateHome(devices.home, devices.exclusive)

    def __str__(self) -> str:
        """The driver's name, as moby `driver.go` String has it."""
        return "devicemapper"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def home(self) -> Path:
        return self.devices.home

    def create(
        self,
        id: str,  # noqa: A002 - the seed's name
        parent: str = "",
        *,
        mount_label: str = "",
        storage_opt: Mapping[str, str] | None = None,
        owner: str = "",
    ) -> None:
        """Make layer *id* on top of *parent*, or on the empty base layer.

        *storage_opt* may hold `size`, such as "20G": at least the parent's size.  *mount_label* is
        taken for Docker's sake: labels are given at the mount.  *owner* is remembered: for whom a
        front end makes it.  Durable when it returns.

        `UsageError`, `LayerExists`, `LayerNotFound` for the parent, `PoolFull`.  moby `driver.go`
        Create.
        """
        options = parse_layer_options(storage_opt or {})
        if mount_label:
            log.debug("layer %r: its label is set when it is mounted", id)
        self.devices.add_device(id, parent, size=options.size, owner=owner)

    def remove(self, id: str) -> Deletion:  # noqa: A002 - the seed's name
        """Delete a layer; one that does not exist is removed already.

        With dm.use_deferred_deletion a layer in use is deleted when its last user is gone, which
        the result tells; without it that is `LayerBusy`.  moby `driver.go` Remove.
        """
        layer = layer_id(id)
        deletion = Deletion.DONE
        with suppress(LayerNotFound):
            deletion = self.devices.delete_device(layer)
        self._remove_mount_point(layer)
        return deletion

    def get(
        self,
        id: str,  # noqa: A002 - the seed's name
        mount_label: str = "",
        *,
        user: str = "",
        once: bool = False,
    ) -> str:
        """Mount a layer, or count one more user, and return the directory with its files.

        That is `<home>/mnt/<id>/rootfs`.  A *user* with a name is remembered until the next boot,
        whatever becomes of this process; with *once* he is counted once only.  `LayerNotFound`,
        `LayerBusy`, `MountFailed`, `UsageError` for a label that is not fit.  moby `driver.go` Get.
        """
        layer = layer_id(id)
        if not self.devices.has_device(layer):  # before anything is made for it
            raise LayerNotFound(layer)
        path = self._mount_point(layer)
        self._private_home.pin()

        def make_mount_point() -> None:
            for directory in (path.parent, path):
                make_owned(directory, 0o755, self.devices.owner)

        self.devices.mount_device(
            layer, path, mount_label, user=user, once=once, make_place=make_mount_point
        )
        try:
            prepare_root(layer, path, self.devices.owner)
        except BaseException:
            self.put(layer, user=user)
            raise
        return str(path / ROOTFS)

    def put(self, id: str, *, user: str = "") -> None:  # noqa: A002 - the seed's name
        """Take back one `get`; the last one unmounts the layer and removes its mount point.

        `LayerNotFound`, `LayerNotMounted`; `LayerBusy` names who uses it, and it can be called
        again.  moby `driver.go` Put.
        """
        layer = layer_id(id)
        self.devices.unmount_device(layer, user=user)

    def activate(self, id: str) -> str:  # noqa: A002 - the seed's name
        """Make a layer's block device without mounting it, and return its path.

        For a virtual machine, or a tool for disks.  One that is there already is returned as it is.
        It has no protection from two users: do not mount the layer meanwhile.  `LayerNotFound`,
        `LayerBusy` if it is served over NBD.
        """
        return str(self.devices.activate_device(layer_id(id)))

    def deactivate(self, id: str) -> bool:  # noqa: A002 - the seed's name
        """Take back `activate` or `serve_nbd`; whether there was anything to take back.

        `LayerNotFound`; `LayerBusy` names who uses it, and it can be called again.
        """
        return self.devices.deactivate_device(layer_id(id))

    def serve_nbd(
        self,
        id: str,  # noqa: A002 - the seed's name
        socket: Path | str | None = None,
        *,
        read_only: bool = False,
    ) -> str:
        """Serve a layer over NBD on a unix socket of mode 0600, and return its URI.

        `deactivate` ends it.  For virtual machines on hosts without loop devices; embedded engine
        only (`EnvironmentLacking` says what to do elsewhere).  A snapshot that is made meanwhile
        is consistent as after a loss of power: the client's file system is not frozen.
        `LayerNotFound`, `LayerBusy`, `UsageError` for a socket that cannot be.
        """
        return self.devices.serve_nbd(layer_id(id), socket, read_only=read_only).uri()

    def exists(self, id: str) -> bool:  # noqa: A002 - the seed's name
        """Whether the layer exists; `UsageError` for an id that no layer can have.  moby Exists."""
        return self.devices.has_device(layer_id(id))

    def layers(self) -> list[str]:
        """The ids of all layers but the base layer, sorted."""
        return [layer for layer in self.devices.list() if layer]

    def status(self) -> list[tuple[str, str]]:
        """The rows of `docker info`, keys and values in moby's order (`driver.go` Status)."""
        return rows(self.devices.status())

    def get_metadata(self, id: str) -> dict[str, str]:  # noqa: A002 - the seed's name
        """What `docker inspect` shows of a layer, size in bytes; `LayerNotFound`.

        moby `driver.go` GetMetadata.
        """
        info = self.devices.dev_info(layer_id(id))
        return {
            "DeviceId": str(info.device_id),
            "DeviceSize": str(info.size),
            "DeviceName": info.name(),
        }

    def changes(self, id: str, parent: str = "") -> "list[Change]":  # noqa: A002 - the seed's name
        """What differs between a layer and its parent; without one, all that it holds."""
        with self.each_change(id, parent) as found:
            return list(found)

    @contextmanager
    def each_change(self, id: str, parent: str = "") -> "Iterator[Iterator[Change]]":  # noqa: A002 - the seed's name
        """The same one by one, in memory that does not grow with their number.

        The layers are read as the changes are asked for; they stay mounted until the context ends.
        """
        with self._compared(id, parent) as (_, found):
            yield found

    def write_diff(self, id: str, parent: str, out: BinaryIO) -> None:  # noqa: A002 - the seed's name
        """Write the changes of a layer as an uncompressed tar."""
        from devmapper.layerdiff.archive import write_diff

        with self._compared(id, parent) as (root, found):
            write_diff(root, found, out, ids=self.ids)

    @contextmanager
    def diff(self, id: str, parent: str = "") -> Iterator[BinaryIO]:  # noqa: A002 - the seed's name
        """The same as a stream to read from; the layers stay mounted until the context ends.

        An error while it is written is raised when the context ends: what was read until then is
        not a whole archive.
        """
        from devmapper.layerdiff.archive import write_diff

        with (
            self._compared(id, parent) as (root, found),
            _written_by(lambda out: write_diff(root, found, out, ids=self.ids)) as stream,
        ):
            yield stream

    def apply_diff(
        self,
        id: str,  # noqa: A002 - the seed's name
        parent: str,
        stream: BinaryIO,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Unpack a tar of changes into a layer; returns the sum of the sizes in its headers.

        *parent* is taken for Docker's sake: the layer itself has all of its parent's files.  When
        it returns, the files are durable; a pool or disk too full for them is an error here, where
        unmounting would not tell.
        """
        from devmapper.layerdiff.apply import apply

        if parent and not self.exists(parent):
            raise LayerNotFound(parent)
        with self._tree(id) as root, written_out(root):
            return apply(root, stream, progress=progress, ids=self.ids)

    def diff_size(self, id: str, parent: str = "") -> int:  # noqa: A002 - the seed's name
        """Bytes of the files that a layer has added or modified."""
        from devmapper.layerdiff.changes import diff_size

        with self._compared(id, parent) as (root, found):
            return diff_size(root, found)

    def usage(self, records: Mapping[LayerId, LayerRecord] | None = None) -> list[LayerUsage]:
        """What each layer takes, the base layer too (as "base"), from a copy of pool metadata.

        Who has read all records already gives them, and they are not read again.
        """
        from devmapper.thin.blocks import FileDevice
        from devmapper.thin.ls import ls

        pool = self.devices.pool
        if records is None:
            records = self.devices.parts.graph.store.load_all()
        with tempfile.TemporaryDirectory(prefix="devmapper-") as directory:
            copy = Path(directory) / "metadata"
            self.devices.ask(lambda pool: pool.export_metadata(copy))
            with FileDevice.open(copy, read_only=True) as reader:
                listed = {device.thin_id: device for device in ls(reader)}
        block_size = pool.status().block_size
        found = []
        for layer, record in sorted(records.items()):
            device = listed.get(record.thin_id)
            if device is None or record.deleted:
                continue
            found.append(
                LayerUsage(
                    file_name(layer),
                    record.thin_id,
                    record.size,
                    device.mapped_blocks * block_size,
                    device.exclusive_blocks * block_size,
                    device.shared_blocks * block_size,
                )
            )
        return found

    def cleanup(self) -> None:
        """Unmount every layer, let go of the pool, and undo the private mount of the home.

        `LayerBusy` names who keeps it from ending; the rest is let go.  moby `driver.go` Cleanup.
        """
        self.devices.shutdown()
        self._private_home.release(seconds=1.0)

    def close(self) -> None:
        """Let go of the graph; what is mounted stays mounted.  Idempotent."""
        if self.devices.is_open:
            self.devices.close()
            self._private_home.release()

    def _mount_point(self, layer: str) -> Path:
        return self.devices.home / "mnt" / layer

    def _remove_mount_point(self, layer: LayerId) -> None:
        """moby 1.7 leaves the directories behind."""
        mounts = self.devices.parts.mounts
        with mounts.hold(layer):
            mounts.remove_mount_point(layer)

    @contextmanager
    def _tree(self, id: str) -> Iterator[Path]:  # noqa: A002 - the seed's name
        """A layer's files, mounted for the duration; nobody can unmount it meanwhile."""
        root = Path(self.get(id))
        try:
            with opened(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW):
                yield root
        finally:
            self.put(id)

    @contextmanager
    def _trees(self, id: str, parent: str) -> Iterator[tuple[Path, Path | None]]:  # noqa: A002 - the seed's name
        if parent and not self.exists(parent):
            raise LayerNotFound(parent)
        with self._tree(id) as new:
            if not parent:
                yield new, None
                return
            with self._tree(parent) as old:
                yield new, old

    @contextmanager
    def _compared(self, id: str, parent: str) -> "Iterator[tuple[Path, Iterator[Change]]]":  # noqa: A002 - the seed's name
        """A layer's mounted files and its changes, which are found as they are asked for."""
        from devmapper.layerdiff.changes import compared

        with self._trees(id, parent) as (new, old):
            suspects = None if old is None else self._suspects(id, parent, new, old)
            with compared(new, old, suspects=suspects) as found:
                yield new, found

    def _suspects(self, id: str, parent: str, new: Path, old: Path) -> "InodeSet | None":  # noqa: A002 - the seed's name
        """Inodes that may differ between two mounted layers, from their changed blocks if possible.

        None for all of them.
        """
        from devmapper.layerdiff.inode_ranges import ByteRange
        from devmapper.layerdiff.unchanged import MountedTree, changed_inodes

        delta = self.devices.delta(id, parent)
        if delta is None:
            return None
        return changed_inodes(
            MountedTree(new, delta.new_device),
            MountedTree(old, delta.old_device),
            (ByteRange(begin, begin + length) for begin, length in delta.changed),
        )


def _engine(choice: "Preference | Engine") -> Engine:
    if not isinstance(choice, str):
        return choice
    from devmapper.engine.select import choose_engine

    return choose_engine(choice)


@contextmanager
def written_out(root: Path) -> Iterator[None]:
    """What is written below *root* meanwhile is durable afterwards, or that is an `OSError`."""
    with opened(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) as fd:
        yield
        libc.syncfs(fd)


@contextmanager
def _written_by(write: Callable[[BinaryIO], None]) -> Iterator[BinaryIO]:
    """A stream of what *write*, in a thread of its own, puts into a pipe."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with open(write_fd, "wb") as out:
                write(out)
        except BrokenPipeError:
            pass  # the reader had enough
        except BaseException as err:  # noqa: BLE001 - carried over to the reader's thread
            failures.append(err)

    writer = threading.Thread(target=run, name="diff", daemon=True)
    with open(read_fd, "rb") as stream:
        writer.start()
        try:
            yield stream
        finally:
            stream.close()
            writer.join()
    if failures:
        raise failures[0]
