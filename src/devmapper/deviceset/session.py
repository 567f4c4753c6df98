"""The graph under its lock: what every operation that changes something works on."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from devmapper.deviceset.consistency import Consistency, present_in_pool
from devmapper.deviceset.ids import ThinIds
from devmapper.deviceset.lock import GraphLock
from devmapper.deviceset.names import BASE, GraphNames, LayerId, file_name
from devmapper.deviceset.options import Options
from devmapper.deviceset.origin import quiesced
from devmapper.deviceset.records import Extra, LayerRecord, RecordStore
from devmapper.deviceset.space import check_free_space
from devmapper.deviceset.steps import Checkpoint, Step
from devmapper.deviceset.transaction import Journal
from devmapper.engine.port import ThinPool
from devmapper.errors import EngineGone, LayerNotFound, ThinIdExists, ThinIdsExhausted
from devmapper.units import Bytes, ThinId

log = logging.getLogger(__name__)

T = TypeVar("T")

_ID_COLLISIONS = 3  # the pool is asked again after each, so a second one means a foreign writer


class Graph:
    """One open graph.  Methods may be called from any thread; `session` serialises."""

    def __init__(self, home: Path, options: Options, checkpoint: Checkpoint) -> None:
        self.home = home
        self.options = options
        self.names = GraphNames.of(home, options.thin_pool_device)
        self.store = RecordStore(home / "metadata")
        self.lock = GraphLock(home)
        self.checkpoint = checkpoint
        self.reopen: Callable[[], ThinPool] | None = None  # how to get the pool of an engine again
        self.on_revival: list[Callable[[Session], object]] = []  # called after that
        self._session: Session | None = None
        self._holding = threading.local()

    def adopt(self, pool: ThinPool) -> "Session":
        """Work on *pool* from now on: bring records and pool together, learn the ids in use.

        Call under the graph's lock.
        """
        self._session = Session(self, pool)
        self._session.load()
        return self._session

    @contextmanager
    def session(self) -> Iterator["Session"]:
        """Hold the graph; what other processes did since the last time has been taken in.

        An engine whose process was killed is started anew: here nothing is half done that its
        pool, which is at its last commit, has forgotten.
        """
        with self.lock.hold():
            if self._session is None:
                message = "the graph is closed"
                raise RuntimeError(message)
            try:
                self._session.refresh()
            except EngineGone as err:
                if self.reopen is None:
                    raise
                log.warning("%s: it is started again", err)
                session = self.adopt(self.reopen())
                for call in self.on_revival:
                    call(session)
            self._holding.graph = True
            try:
                yield self._session
            finally:
                self._holding.graph = False

    def ask(self, question: Callable[[ThinPool], T]) -> T:
        """What *question* finds out about the pool, for what needs no lock.

        An engine that was killed is started anew for it, except within a session: what that has
        done may be forgotten, so there the error is raised.
        """
        try:
            return question(self.pool)
        except EngineGone:
            if getattr(self._holding, "graph", False):
                raise
            with self.session() as session:
                return question(session.pool)

    @property
    def is_open(self) -> bool:
        return self._session is not None

    @property
    def pool(self) -> ThinPool:
        """The pool, for what needs no lock: asking, activating, deactivating."""
        if self._session is None:
            message = "the graph is closed"
            raise RuntimeError(message)
        return self._session.pool

    def keep_last_id(self) -> None:
        """Save the counter of thin ids if this process moved it."""
        if self._session is not None and self._session.moved_ids:
            with self.lock.hold():
                self._session.save_last_id()

    def close(self) -> None:
        self._session = None


class Session:
    """Proof that the graph's lock is held; obtained from `Graph.session` only.

    Nothing here sleeps, mounts or copies.
    """

    def __init__(self, graph: Graph, pool: ThinPool) -> None:
        self.pool = pool
        self.store = graph.store
        self.names = graph.names
        self.checkpoint = graph.checkpoint
        self._min_free_space = graph.options.min_free_space
        self._journal = Journal(graph.store, pool, graph.checkpoint)
        self._ids = ThinIds((), 0)
        self.doomed: tuple[
            LayerId, ...
        ] = ()  # found when all records were read last; the base is not among them

    def load(self) -> None:
        """Recover, and read all records: what happens once, when a graph is opened."""
        self._journal.recover()
        self._learn_ids(self.store.load_deviceset().next_device_id)

    def refresh(self) -> None:
        """Recover, unless everything is as our own last transaction left it.

        What other processes did meanwhile is not read again, whatever the number of layers:
        records are read when they are needed, and the pool refuses a thin id that is in use.
        """
        if self._journal.is_undisturbed():
            return
        intent = self._journal.recover()
        if intent is not None:
            self._ids.follow(intent.thin_id)

    def find(self, layer: LayerId) -> LayerRecord | None:
        """The record of a layer that exists; one that is on its way out does not."""
        record = self.store.load(layer)
        return None if record is None or record.deleted else record

    def get(self, layer: LayerId) -> LayerRecord:
        record = self.find(layer)
        if record is None:
            raise LayerNotFound(file_name(layer))
        return record

    def create_thin(self, layer: LayerId, size: Bytes) -> LayerRecord:
        """A new, empty thin device for *layer*."""
        return self._create(layer, size, None)

    def create_snap(
        self, layer: LayerId, origin: LayerId, record: LayerRecord, *, extra: Extra = ()
    ) -> LayerRecord:
        """A snapshot of *origin*, whose record is *record*, for *layer*.

        The origin is suspended for just that if it is active, so that the snapshot of a mounted
        file system is consistent.  *extra* becomes a part of the new record.
        """
        return self._create(layer, record.size, (origin, record.thin_id), extra=extra)

    def create_unfinished(
        self,
        layer: LayerId,
        origin: LayerId,
        record: LayerRecord,
        size: Bytes,
        *,
        extra: Extra = (),
    ) -> LayerRecord:
        """A snapshot of *size* bytes that does not exist for anybody until it is completed.

        It carries Docker's mark for a deferred deletion: whoever comes after a crash, we or Docker,
        deletes it.
        """
        return self._create(layer, size, (origin, record.thin_id), doomed=True, extra=extra)

    def complete(self, layer: LayerId, record: LayerRecord) -> LayerRecord:
        """Let an unfinished layer exist, durably."""
        if self.store.load(layer) != record:
            raise LayerNotFound(file_name(layer))
        completed = record._replace(deleted=False)
        self.store.save(layer, completed)
        self.checkpoint(Step.LAYER_COMPLETED)
        return completed

    def rewrite(self, layer: LayerId, change: Callable[[LayerRecord], Extra]) -> LayerRecord:
        """Replace what a record holds beyond Docker's members, in one step and durably.

        *change* is given the record as it is.  `LayerNotFound` if there is none.
        """
        record = self.get(layer)
        changed = record._replace(extra=change(record))
        self.store.save(layer, changed)
        self.checkpoint(Step.RECORD_REWRITTEN)
        return changed

    def delete(self, layer: LayerId, record: LayerRecord) -> None:
        """Delete a layer that is not active; `ThinBusy` changes nothing."""
        with self._journal.begin(layer, record.thin_id) as transaction:
            transaction.delete_thin()
            transaction.remove_record()
        self._ids.free(record.thin_id)

    def doom(self, layer: LayerId, record: LayerRecord) -> LayerRecord:
        """Mark a layer as deleted, durably: from here on it does not exist for anybody.

        It is Docker's mark for a deferred deletion, so that Docker too completes it.
        """
        doomed = record._replace(deleted=True)
        self.store.save(layer, doomed)
        self.checkpoint(Step.LAYER_DOOMED)
        return doomed

    @property
    def moved_ids(self) -> bool:
        return self._ids.moved

    def save_last_id(self) -> None:
        """Keep the counter for the next start, if it moved."""
        stored = self.store.load_deviceset()
        if stored.next_device_id != self._ids.last:
            self.store.save_deviceset(stored._replace(next_device_id=self._ids.last))

    def consistency(self) -> Consistency:
        return Consistency.of(self.store.load_all(), self.pool.thin_ids())

    def _learn_ids(self, last: int) -> None:
        records = self.store.load_all()
        used = {record.thin_id for record in records.values()}
        self._ids = ThinIds(used | set(self.pool.thin_ids()), last)
        self.doomed = tuple(
            layer for layer, each in records.items() if each.deleted and layer != BASE
        )

    def _allocate(self) -> ThinId:
        try:
            return self._ids.allocate()
        except ThinIdsExhausted:
            # Ids that other processes have freed are still in use for all we know
            self._learn_ids(self._ids.last)
            return self._ids.allocate()

    def _create(
        self,
        layer: LayerId,
        size: Bytes,
        origin: tuple[LayerId, ThinId] | None,
        *,
        doomed: bool = False,
        extra: Extra = (),
    ) -> LayerRecord:
        check_free_space(self._journal.status, self._min_free_space)
        for attempt in range(_ID_COLLISIONS):
            thin_id = self._allocate()
            try:
                return self._create_as(thin_id, layer, size, origin, doomed=doomed, extra=extra)
            except ThinIdExists:
                self._ids.take(self.pool.thin_ids())
                if attempt + 1 == _ID_COLLISIONS or not self._journal.settled:
                    raise
            except Exception:
                self._ids.free(thin_id)
                raise
        raise AssertionError

    def _create_as(
        self,
        thin_id: ThinId,
        layer: LayerId,
        size: Bytes,
        origin: tuple[LayerId, ThinId] | None,
        *,
        doomed: bool,
        extra: Extra,
    ) -> LayerRecord:
        with self._journal.begin(layer, thin_id) as transaction:
            if origin is None:
                transaction.create_thin()
            else:
                parent, parent_id = origin
                with (
                    quiesced(self.pool, self.names.device(parent)),
                    present_in_pool(parent, parent_id),
                ):
                    transaction.create_snap(parent_id)
            return transaction.save_record(size, doomed=doomed, extra=extra)
