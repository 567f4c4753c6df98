"""All snapshots by their names, in memory: made of the records once, kept true by who writes them.

It answers what no single record can: which layer has a name, and who has children.  A name is taken
before work on it begins, so that two requests never work on the same one.
"""

import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from devmapper.deviceset.names import LayerId
from devmapper.deviceset.records import LayerRecord
from devmapper.errors import SnapshotExists, SnapshotNotFound, SnapshotStateError, UsageError
from devmapper.snapshots.model import Info, Kind
from devmapper.snapshots.record import NotASnapshot, SnapshotRecord, decode

log = logging.getLogger(__name__)

ROOT_KEY: Final = ""
_NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})


class Entry(NamedTuple):
    """One snapshot and the layer that it is."""

    layer: LayerId
    record: LayerRecord  # without what is in *snapshot*: there may be tens of thousands
    snapshot: SnapshotRecord

    @classmethod
    def of(cls, layer: LayerId, record: LayerRecord, snapshot: SnapshotRecord) -> Self:
        lean = snapshot._replace(
            parent=LayerId(sys.intern(snapshot.parent)), labels=snapshot.labels or _NO_LABELS
        )
        return cls(layer, record._replace(extra=()), lean)


class Index:
    """Every method may be called from any thread; none of them waits for anything else."""

    def __init__(self, records: Mapping[LayerId, LayerRecord]) -> None:
        self._guard = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._keys: dict[LayerId, str] = {}
        self._children: Counter[LayerId] = Counter()
        self._taken: set[str] = set()  # names that are being made
        self._leaving: set[str] = set()
        for layer, record in records.items():
            self._learn(layer, record)

    def _learn(self, layer: LayerId, record: LayerRecord) -> None:
        if record.deleted:
            return
        try:
            snapshot = decode(record)
        except NotASnapshot as err:
            log.warning("layer %r is left out of the snapshots: %s", layer, err)
            return
        if snapshot is None:
            return
        if snapshot.key in self._entries:
            log.warning("layer %r is left out: there is a snapshot %r", layer, snapshot.key)
            return
        self._put(Entry.of(layer, record, snapshot))

    def get(self, key: str) -> Entry:
        """`SnapshotNotFound`, as for one that is leaving."""
        with self._guard:
            return self._get(key)

    def parent_of(self, entry: Entry) -> Entry | None:
        """The snapshot that it was made from; None for the root."""
        with self._guard:
            key = self._keys.get(entry.snapshot.parent)
            return None if key is None else self._entries.get(key)

    def info(self, key: str) -> Info:
        with self._guard:
            return self._info(self._get(key))

    def entries(self) -> list[Entry]:
        """All of them at one moment, the root too."""
        with self._guard:
            return list(self._entries.values())

    def infos(self) -> list[Info]:
        """All of them at one moment, sorted by name."""
        with self._guard:
            listed = [
                self._info(entry)
                for key, entry in self._entries.items()
                if key != ROOT_KEY and key not in self._leaving
            ]
        listed.sort()
        return listed

    @contextmanager
    def making(self, key: str, parent: str) -> Iterator[Entry]:
        """Take *key* for a new snapshot of *parent*, which cannot be removed meanwhile.

        `SnapshotNotFound` for the parent, `UsageError` for one that is not committed,
        `SnapshotExists`.  The caller adds the snapshot inside the context.
        """
        with self._guard:
            found = self._get(parent)
            if found.snapshot.kind is not Kind.COMMITTED:
                raise UsageError(f"parent {parent!r} is not a committed snapshot")
            self._take(key)
            self._children[found.layer] += 1
        try:
            yield found
        finally:
            with self._guard:
                self._children[found.layer] -= 1
                self._taken.discard(key)

    @contextmanager
    def renaming(self, key: str, name: str) -> Iterator[Entry]:
        """Take *name* for the snapshot *key*; the caller replaces it inside the context."""
        with self._guard:
            found = self._get(key)
            if found.snapshot.kind is not Kind.ACTIVE:
                raise SnapshotStateError(key, f"snapshot {key!r} is {_a(found)}, not an active one")
            self._take(name)
        try:
            yield found
        finally:
            with self._guard:
                self._taken.discard(name)

    @contextmanager
    def removing(self, key: str) -> Iterator[Entry]:
        """Let nobody find *key* meanwhile; after an error it is there again.

        `SnapshotNotFound`; `SnapshotStateError` if it has children.
        """
        with self._guard:
            found = self._get(key)
            if self._children[found.layer] > 0:
                raise SnapshotStateError(key, f"cannot remove snapshot {key!r}: it has children")
            self._leaving.add(key)
        try:
            yield found
        except BaseException:
            with self._guard:
                self._leaving.discard(key)
            raise
        self.drop(found)

    def add(self, entry: Entry) -> None:
        with self._guard:
            self._put(entry)

    def replace(self, old: Entry, new: Entry) -> None:
        """The same layer with another record, or under another name."""
        with self._guard:
            self._drop(old)
            self._put(new)

    def drop(self, entry: Entry) -> None:
        with self._guard:
            self._drop(entry)

    def _get(self, key: str) -> Entry:
        found = self._entries.get(key)
        if found is None or key in self._leaving:
            raise SnapshotNotFound(key)
        return found

    def _take(self, key: str) -> None:
        if key in self._entries or key in self._taken:
            raise SnapshotExists(key)
        self._taken.add(key)

    def _put(self, entry: Entry) -> None:
        self._entries[entry.snapshot.key] = entry
        self._keys[entry.layer] = entry.snapshot.key
        if entry.snapshot.parent:
            self._children[entry.snapshot.parent] += 1

    def _drop(self, entry: Entry) -> None:
        key = entry.snapshot.key
        if self._entries.get(key) is None or self._entries[key].layer != entry.layer:
            return
        del self._entries[key]
        self._keys.pop(entry.layer, None)
        self._leaving.discard(key)
        if entry.snapshot.parent:
            self._children[entry.snapshot.parent] -= 1

    def _info(self, entry: Entry) -> Info:
        found = entry.snapshot
        parent = self._keys.get(found.parent, ROOT_KEY)
        return Info(found.key, found.kind, parent, found.labels, found.created, found.updated)


def _a(entry: Entry) -> str:
    return "a view" if entry.snapshot.kind is Kind.VIEW else "a committed one"
