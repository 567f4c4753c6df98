"""`Snapshots`: containerd's Snapshots service on the layers of a graph.

A snapshot is a layer: one thin device, one record.  Nothing is mounted here; who asks is told which
block device to mount.  Its root is the root of the file system, where Docker's layers have
`rootfs`.  Meanings follow containerd `core/snapshots/snapshotter.go` and what its metadata store
does (`core/snapshots/storage/bolt.go`).
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.keyed_lock import KeyedLock
from devmapper.deviceset.names import LayerId
from devmapper.deviceset.records import Extra, LayerRecord
from devmapper.deviceset.session import Session
from devmapper.deviceset.sizing import create_layer
from devmapper.engine.port import DeviceInfo
from devmapper.errors import (
    DevmapperError,
    LayerBusy,
    LayerNotFound,
    SnapshotNotFound,
    SnapshotStateError,
    UsageError,
)
from devmapper.linux import blockdev
from devmapper.snapshots.index import ROOT_KEY, Entry, Index
from devmapper.snapshots.model import Info, Kind, Mount, Usage
from devmapper.snapshots.record import NotASnapshot, SnapshotRecord, decode, encode
from devmapper.snapshots.root import ensure_root
from devmapper.snapshots.usage import inodes_of, own_bytes
from devmapper.units import Bytes, parse_size

log = logging.getLogger(__name__)

MAX_SIZE_LABEL: Final = "containerd.io/snapshot/max-size"
_MAX_KEY_BYTES: Final = 4096
_MAX_LABEL_BYTES: Final = 512 * 1024  # of all labels of one snapshot: a record has 1 MiB
_LABELS: Final = "labels"
_RELEASE_SECONDS: Final = 1.0


class Snapshots:
    """The snapshots of an open graph.  Methods may be called from any thread.

    One process at a time: it knows all names by heart.  The daemon sees to that.
    """

    def __init__(self, devices: DeviceSet) -> None:
        """Read the records.  *devices* stays the caller's to close.

        What a process that was killed has left active of committed snapshots is deactivated.
        """
        self._parts = devices.parts
        self._graph = self._parts.graph
        self._mounts = self._parts.mounts
        self._index = Index(self._graph.store.load_all())
        self._keys: KeyedLock[str] = KeyedLock()
        self._root_lock = threading.Lock()
        self._has_root = False
        self._fs_type = ""
        self._tidy()

    def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> tuple[Mount, ...]:
        """Make a writable snapshot of the committed one *parent*, or an empty one.

        Its device is active when it returns, and all of it durable.  The label
        `containerd.io/snapshot/max-size`, such as "20GiB", gives it a size of its own, not below
        its parent's; its file system grows to it.

        `UsageError` for names, labels, sizes and a parent that is not committed;
        `SnapshotNotFound` for the parent, `SnapshotExists`, `PoolFull`.
        """
        labels = _checked(labels)
        size = _wanted_size(labels)
        return self._make(Kind.ACTIVE, key, parent, labels, size)

    def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> tuple[Mount, ...]:
        """Make a snapshot that is mounted read-only; otherwise as `prepare`."""
        return self._make(Kind.VIEW, key, parent, _checked(labels), None)

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """How to mount an active snapshot or a view; its device is active when it returns.

        It is not active before that after a reboot.  `SnapshotNotFound`; `SnapshotStateError` for a
        committed one.
        """
        _check_key(key)
        with self._keys.hold(key):
            entry = self._index.get(key)
            if entry.snapshot.kind is Kind.COMMITTED:
                raise SnapshotStateError(
                    key, f"snapshot {key!r} is committed: it has no mounts, a view of it has"
                )
            with (
                self._named(entry),
                self._mounts.hold(entry.layer),
                self._graph.session() as session,
            ):
                record = session.get(entry.layer)
                return self._activate(session, entry._replace(record=record))

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """Turn the active snapshot *key* into the committed one *name*.

        What was written to it is durable before it is committed, and the change itself when it
        returns; its device is inactive then unless somebody still uses it.  *labels* replace those
        it had.  `SnapshotNotFound`, `SnapshotExists`, `SnapshotStateError`, `UsageError`.
        """
        _check_key(name)
        _check_key(key)
        labels = _checked(labels)
        with (
            self._keys.hold(key),
            self._index.renaming(key, name) as entry,
            self._named(entry),
            self._mounts.hold(entry.layer),
        ):
            inodes = self._flush(entry)
            now = time.time_ns()
            committed = entry.snapshot._replace(
                key=name,
                kind=Kind.COMMITTED,
                labels=labels,
                created=now,
                updated=now,
                inodes=inodes,
            )
            self._rewrite(entry, committed)
            self._let_go(entry.layer)
        log.info("committed snapshot %r as %r", key, name)

    def remove(self, key: str) -> None:
        """Delete a snapshot that has no children.

        `SnapshotNotFound`, `SnapshotStateError`; `LayerBusy` if it is mounted, unless
        dm.use_deferred_deletion lets it go with its last user.
        """
        _check_key(key)
        with self._keys.hold(key), self._index.removing(key) as entry:
            try:
                self._parts.deletions.delete(entry.layer)
            except LayerNotFound:
                log.info("snapshot %r was deleted by another process", key)
            except LayerBusy as err:
                raise LayerBusy(key, err.holders) from err
        log.info("removed snapshot %r", key)

    def stat(self, name: str) -> Info:
        """`SnapshotNotFound`."""
        _check_key(name)
        return self._index.info(name)

    def update(self, name: str, labels: Mapping[str, str], fields: Sequence[str] = ()) -> Info:
        """Change labels: all of them (no *fields*, or `labels`), or single ones (`labels.<key>`).

        A label that is empty or missing is removed.  `UsageError` for other fields,
        `SnapshotNotFound`.
        """
        _check_key(name)
        with self._keys.hold(name):
            entry = self._index.get(name)
            changed = _checked(_updated(entry.snapshot.labels, labels, fields))
            with self._named(entry), self._mounts.hold(entry.layer):
                self._rewrite(
                    entry, entry.snapshot._replace(labels=changed, updated=time.time_ns())
                )
            return self._index.info(name)

    def walk(self) -> Iterator[Info]:
        """All snapshots as they are at this moment, sorted by name."""
        return iter(self._index.infos())

    def usage(self, key: str) -> Usage:
        """What a snapshot takes beyond its parent.  `SnapshotNotFound`."""
        _check_key(key)
        entry = self._index.get(key)
        parent = self._index.parent_of(entry)
        with self._named(entry):
            inodes = self._inodes(entry)
            below = 0 if parent is None else self._inodes(parent)
            return Usage(self._size(entry, parent), max(0, inodes - below))

    def cleanup(self) -> None:
        """Complete the removals that were put off, as far as that is possible now."""
        self._parts.deletions.complete_all()

    def close(self) -> None:
        """Forget everything; devices stay active, as their users expect."""
        self._index = Index({})

    def _make(
        self, kind: Kind, key: str, parent: str, labels: Mapping[str, str], size: Bytes | None
    ) -> tuple[Mount, ...]:
        _check_key(key)
        if parent == ROOT_KEY:
            self._ensure_root()
        else:
            _check_key(parent)
        with self._keys.hold(key), self._index.making(key, parent) as origin:
            layer = LayerId(f"snapshot-{secrets.token_hex(8)}")
            now = time.time_ns()
            snapshot = SnapshotRecord(key, kind, origin.layer, labels, now, now)
            with self._named(origin), self._mounts.hold(layer):
                made, mounts = self._create(layer, snapshot, origin, size)
            self._index.add(made)
        log.info("made snapshot %r of %r", key, parent)
        return mounts

    def _create(
        self, layer: LayerId, snapshot: SnapshotRecord, origin: Entry, size: Bytes | None
    ) -> tuple[Entry, tuple[Mount, ...]]:
        extra = encode(snapshot)
        if size is not None and size != origin.record.size:
            record = create_layer(self._graph, self._mounts, layer, origin.layer, size, extra=extra)
            with self._graph.session() as session:
                return self._activated(session, Entry.of(layer, record, snapshot))
        with self._graph.session() as session:
            parent = session.get(origin.layer)
            record = session.create_snap(layer, origin.layer, parent, extra=extra)
            return self._activated(session, Entry.of(layer, record, snapshot))

    def _activated(self, session: Session, entry: Entry) -> tuple[Entry, tuple[Mount, ...]]:
        """Activate a snapshot that has just been made; where that fails there is none."""
        try:
            return entry, self._activate(session, entry)
        except Exception as err:
            try:
                session.delete(entry.layer, entry.record)
            except (DevmapperError, OSError) as other:
                err.add_note(f"what was made of it is left: {other}")
                self._index.add(entry)  # so that it can be removed
            raise

    def _activate(self, session: Session, entry: Entry) -> tuple[Mount, ...]:
        device = self._mounts.activate(session, entry.layer, entry.record)
        if not self._fs_type:  # every layer has the base's, which stays what it is
            self._fs_type = session.store.load_deviceset().base_file_system
        fs_type = self._fs_type or blockdev.probe_fs_type(device)
        # Every snapshot of an xfs has its origin's UUID, which xfs refuses to mount twice
        options = ["nouuid"] if fs_type == "xfs" else []
        for option in ",".join(self._graph.options.mount_options).split(","):
            if option and option not in options:
                options.append(option)
        if entry.snapshot.kind is Kind.VIEW:
            options = [*(option for option in options if option != "rw"), "ro"]
        return (Mount(fs_type, str(device), tuple(options)),)

    def _flush(self, entry: Entry) -> int | None:
        """Make durable what was written to the device; the inodes that its files have.

        containerd unmounts before it commits.  Where somebody has it mounted after all, the file
        system is frozen for a moment, so that what is committed is consistent.
        """
        info = self._mounts.info(entry.layer)
        if info is None:
            return self._with_device(entry)
        if info.open_count > 0 or info.nbd is not None:
            with self._graph.pool.suspended(info.name):
                log.debug("snapshot %r is in use while it is committed", entry.snapshot.key)
        if info.nbd is None:
            blockdev.flush(info.path)
        return self._count(info)

    def _with_device(self, entry: Entry) -> int | None:
        """Count the inodes of a snapshot whose device is not active."""
        with self._graph.session() as session:
            self._mounts.activate(session, entry.layer, session.get(entry.layer))
        info = self._mounts.info(entry.layer)
        try:
            return None if info is None else self._count(info)
        finally:
            self._let_go(entry.layer)

    def _count(self, info: DeviceInfo) -> int | None:
        try:
            return inodes_of(info)
        except OSError as err:
            log.warning("inodes on %s are not known: %s", info.path, err)
            return None

    def _inodes(self, entry: Entry) -> int:
        if entry.snapshot.inodes is not None:
            return entry.snapshot.inodes
        with self._mounts.hold(entry.layer):
            info = self._mounts.info(entry.layer)
            found = self._with_device(entry) if info is None else self._count(info)
        if entry.snapshot.kind is Kind.COMMITTED and found is not None:
            self._remember(entry.snapshot._replace(inodes=found))
        return found or 0

    def _size(self, entry: Entry, parent: Entry | None) -> int:
        if entry.snapshot.size is not None or parent is None:
            return entry.snapshot.size or 0
        found = self._graph.ask(
            lambda pool: own_bytes(pool, entry.record.thin_id, parent.record.thin_id)
        )
        if entry.snapshot.kind is Kind.COMMITTED:
            self._remember(entry.snapshot._replace(size=found))
        return found

    def _remember(self, known: SnapshotRecord) -> None:
        """Keep what never changes of a committed snapshot; it is asked for again and again."""
        with self._keys.hold(known.key), suppress(LayerNotFound):
            entry = self._index.get(known.key)
            merged = entry.snapshot._replace(
                inodes=known.inodes if entry.snapshot.inodes is None else entry.snapshot.inodes,
                size=known.size if entry.snapshot.size is None else entry.snapshot.size,
            )
            self._rewrite(entry, merged)

    def _rewrite(self, entry: Entry, snapshot: SnapshotRecord) -> None:
        def change(record: LayerRecord) -> Extra:
            if not _is_as_known(entry, record):
                raise LayerNotFound(entry.layer)  # another process has put something in its place
            return encode(snapshot, record.extra)

        with self._graph.session() as session:
            record = session.rewrite(entry.layer, change)
        self._index.replace(entry, Entry.of(entry.layer, record, snapshot))

    def _let_go(self, layer: LayerId) -> None:
        """Deactivate a device that is not needed any more; what goes wrong can wait."""
        try:
            self._mounts.release(layer, seconds=_RELEASE_SECONDS)
        except LayerBusy as err:
            log.info("%s: its device goes with its last user", err)
            with suppress(DevmapperError, OSError):
                self._mounts.defer(layer)
        except (DevmapperError, OSError) as err:
            log.warning("layer %r stays active: %s", layer, err)

    @contextmanager
    def _named(self, entry: Entry) -> Iterator[None]:
        """For what works on the layer: if it has gone, the snapshot has."""
        try:
            yield
        except SnapshotNotFound:
            raise
        except LayerNotFound as err:
            if err.layer != entry.layer:
                raise
            self._index.drop(entry)
            raise SnapshotNotFound(entry.snapshot.key) from err

    def _tidy(self) -> None:
        names = {
            self._graph.names.device(entry.layer): entry.layer
            for entry in self._index.entries()
            if entry.snapshot.kind is Kind.COMMITTED
        }
        for device in self._graph.pool.devices():
            layer = names.get(device.name)
            if layer is not None and device.open_count == 0:
                self._let_go(layer)

    def _ensure_root(self) -> None:
        with self._root_lock:
            if not self._has_root:
                self._index.add(ensure_root(self._parts))
                self._has_root = True


def _is_as_known(entry: Entry, record: LayerRecord) -> bool:
    try:
        found = decode(record)
    except NotASnapshot:
        return False
    return found is not None and Entry.of(entry.layer, record, found) == entry


def _check_key(key: str) -> None:
    try:
        length = len(key.encode())
    except UnicodeEncodeError as err:
        raise UsageError(f"snapshot key {key!r} is not valid Unicode") from err
    if not key:
        raise UsageError("the key of a snapshot is empty")
    if length > _MAX_KEY_BYTES:
        raise UsageError(
            f"snapshot key has {length} bytes, expected at most {_MAX_KEY_BYTES}: {key[:40]!r}…"
        )
    if "\0" in key:
        raise UsageError(f"snapshot key {key!r} contains a NUL")


def _checked(labels: Mapping[str, str] | None) -> dict[str, str]:
    """A copy without empty labels, which containerd takes for none."""
    found = {key: value for key, value in (labels or {}).items() if value}
    try:
        length = len(json.dumps(found, ensure_ascii=False).encode())
    except UnicodeEncodeError as err:
        raise UsageError("a label is not valid Unicode") from err
    if length > _MAX_LABEL_BYTES:
        raise UsageError(f"labels have {length} bytes, expected at most {_MAX_LABEL_BYTES}")
    return found


def _wanted_size(labels: Mapping[str, str]) -> Bytes | None:
    text = labels.get(MAX_SIZE_LABEL)
    if text is None:
        return None
    try:
        return parse_size(text)
    except UsageError as err:
        raise UsageError(f"label {MAX_SIZE_LABEL}={text!r}: expected a size such as 20GiB") from err


def _updated(
    before: Mapping[str, str], labels: Mapping[str, str], fields: Sequence[str]
) -> dict[str, str]:
    if not fields:
        return dict(labels)
    changed = dict(before)
    for field in fields:
        if field == _LABELS:
            changed = dict(labels)
        elif field.startswith(f"{_LABELS}.") and field != f"{_LABELS}.":
            key = field.removeprefix(f"{_LABELS}.")
            changed[key] = labels.get(key, "")
        else:
            raise UsageError(f"field {field!r} of a snapshot cannot be changed", hint="labels can")
    return changed
