"""The transaction protocol between Docker's files and the pool, and recovery from a crash in it.

An operation on a layer is: write the intent, message the pool, write or remove the record, move
the pool's transaction id.  The last step is the commit point, and it is in the pool.  Each file is
durable before the next step begins.  `docs/internals/transactions.md` has the table of what each
crash leaves behind.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum, auto

from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.records import Extra, LayerRecord, RecordStore, TransactionRecord
from devmapper.deviceset.steps import Checkpoint, Step
from devmapper.engine.port import PoolStatus, ThinPool
from devmapper.errors import (
    DevmapperError,
    PoolFull,
    PoolUnusable,
    ThinBusy,
    ThinIdExists,
    ThinIdMissing,
    TransactionConflict,
)
from devmapper.units import Bytes, ThinId, TransactionId

log = logging.getLogger(__name__)


class Finding(StrEnum):
    """What a comparison of the intent file with the pool tells."""

    CLEAN = auto()
    INTERRUPTED = auto()
    CONFLICT = auto()


def compare(pool: TransactionId, intent: TransactionId | None) -> Finding:
    """Classify an intent file found at start-up.

    moby leaves the file behind when a transaction has ended, so an equal id is the normal case.
    It only logs the conflicting case (deviceset.go processPendingTransaction) and goes on; we
    refuse, because then somebody else wrote to the pool, or one of the disks was restored.
    """
    if intent is None or intent == pool:
        return Finding.CLEAN
    if intent == pool + 1:
        return Finding.INTERRUPTED
    return Finding.CONFLICT


class Transaction:
    """An open transaction: proof that the intent is on disk.  Obtained from `Journal.begin`."""

    def __init__(self, journal: "Journal", intent: TransactionRecord) -> None:
        self._journal = journal
        self.layer = intent.layer
        self.thin_id = intent.thin_id
        self.transaction_id = intent.open_transaction_id
        self.created_thin = False
        self.deleted_thin = False

    def create_thin(self) -> None:
        with self._creating():
            self._journal.pool.create_thin(self.thin_id)

    def create_snap(self, origin: ThinId) -> None:
        with self._creating():
            self._journal.pool.create_snap(self.thin_id, origin)

    def delete_thin(self) -> None:
        """Delete the thin device; one that is missing has been deleted before."""
        with suppress(ThinIdMissing):
            self._journal.pool.delete(self.thin_id)
        self.deleted_thin = True
        self._journal.checkpoint(Step.THIN_DELETED)

    def save_record(self, size: Bytes, *, doomed: bool = False, extra: Extra = ()) -> LayerRecord:
        """`initialized` stays false for all but the base layer, which sets it later (as moby).

        A *doomed* layer is marked as deleted from its beginning.  *extra* are members of the record
        that Docker does not know.
        """
        record = LayerRecord(self.thin_id, size, self.transaction_id, deleted=doomed, extra=extra)
        self._journal.store.save(self.layer, record)
        self._journal.checkpoint(Step.RECORD_SAVED)
        return record

    @contextmanager
    def _creating(self) -> Iterator[None]:
        self.created_thin = True
        try:
            yield
        except (ThinIdExists, PoolFull, PoolUnusable):
            # It is somebody else's, or was refused before it began: nothing to take back
            self.created_thin = False
            raise
        self._journal.checkpoint(Step.THIN_CREATED)

    def remove_record(self) -> None:
        self._journal.store.remove(self.layer)
        self._journal.checkpoint(Step.RECORD_REMOVED)


class Journal:
    """Transactions on one pool.  Used under the graph's lock."""

    def __init__(self, store: RecordStore, pool: ThinPool, checkpoint: Checkpoint) -> None:
        self.store = store
        self.pool = pool
        self.checkpoint = checkpoint
        self.transaction_id = TransactionId(0)  # of the pool, as `recover` or a commit left it
        self.settled = False
        self._status: PoolStatus | None = None

    @property
    def status(self) -> PoolStatus:
        """The pool's status as it was when the session began."""
        if self._status is None:
            self._status = self.pool.status()
        return self._status

    @contextmanager
    def begin(self, layer: LayerId, thin_id: ThinId) -> Iterator[Transaction]:
        """Open a transaction: normal exit commits, an error takes back what was done.

        Once the thin device is deleted there is no way back: such a transaction stays open, and
        `recover` completes it.  An interruption that is no `Exception` leaves everything to
        `recover`, as a crash does.
        """
        current = self.transaction_id
        intent = TransactionRecord(TransactionId(current + 1), layer, thin_id)
        self.settled = False
        self.store.save_transaction(intent)
        self.checkpoint(Step.INTENT_WRITTEN)
        transaction = Transaction(self, intent)
        try:
            yield transaction
            self.pool.set_transaction_id(current, intent.open_transaction_id)
        except Exception as err:
            self._give_up(transaction, err)
            raise
        self.transaction_id = intent.open_transaction_id
        self.settled = True
        self.checkpoint(Step.COMMITTED)

    def is_undisturbed(self) -> bool:
        """Whether nothing happened since our own last transaction.

        Another process moves the pool's id; one that died on its way has left its intent.
        """
        self._status = self.pool.status()
        if not self.settled or self._status.transaction_id != self.transaction_id:
            return False
        intent = self.store.load_transaction()
        return intent is None or intent.open_transaction_id == self.transaction_id

    def recover(self) -> TransactionRecord | None:
        """Bring files and pool together again; returns the last transaction that is known.

        An interrupted creation is undone, an interrupted deletion completed: both by deleting the
        thin device, which may be gone already, and then its record.  A thin device that is in use
        cannot be deleted: its layer is marked as deleted instead and keeps its id, so that nothing
        leaks (moby frees both: deviceset.go rollbackTransaction).
        """
        self._status = self.pool.status()
        pool = self._status.transaction_id
        intent = self.store.load_transaction()
        finding = compare(pool, intent.open_transaction_id if intent else None)
        if finding is Finding.CONFLICT and intent is not None:
            raise TransactionConflict(pool, intent.open_transaction_id)
        if finding is Finding.INTERRUPTED and intent is not None:
            self._undo(intent)
            self.store.remove_transaction()
            self._status = None  # space has become free
            self.checkpoint(Step.RECOVERED)
            log.info("recovered an interrupted operation")
        self.transaction_id = pool
        self.settled = True
        return intent

    def _undo(self, intent: TransactionRecord) -> None:
        record = self.store.load(intent.layer)
        ours = record is not None and record.thin_id == intent.thin_id
        log.info(
            "transaction %d on layer %r was interrupted: deleting thin id %d",
            intent.open_transaction_id,
            file_name(intent.layer),
            intent.thin_id,
        )
        try:
            self.pool.delete(intent.thin_id)
        except ThinIdMissing:
            pass
        except ThinBusy:
            if record is None or not ours:
                raise
            self.store.save(intent.layer, record._replace(deleted=True))
            return
        # The intent may only be forgotten when the deletion cannot come undone
        self.pool.commit()
        self.checkpoint(Step.RECOVERED_THIN)
        if ours:
            self.store.remove(intent.layer)
        self.checkpoint(Step.RECOVERED_RECORD)

    def _give_up(self, transaction: Transaction, cause: Exception) -> None:
        """Take back what an open transaction did; where that fails too, it stays open.

        moby leaves the intent of a failed deletion on disk, and carries the deletion out at its
        next start although it has told its caller that it failed.
        """
        if transaction.deleted_thin:
            return
        try:
            if transaction.created_thin:
                with suppress(ThinIdMissing):
                    self.pool.delete(transaction.thin_id)
                self.pool.commit()
                self.store.remove(transaction.layer)
            self.store.remove_transaction()
        except (DevmapperError, OSError) as err:
            cause.add_note(f"taking it back failed too, which is left to the next start: {err}")
            log.warning("layer %r: could not undo: %s", file_name(transaction.layer), err)
            return
        self.settled = True
