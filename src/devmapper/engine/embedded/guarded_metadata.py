"""Pool metadata behind the metadata lock, for several threads.

Two things happen here and nowhere else: a failed change of metadata degrades the pool (as
`dm-thin.c: metadata_operation_failed`), and the caches of open devices follow every change of a
mapping while the lock is still held.
"""

import errno
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Final

from devmapper.engine.embedded.mapping_cache import CHUNK_BITS, CHUNK_BLOCKS, MappingCache
from devmapper.engine.embedded.modes import PoolState
from devmapper.engine.embedded.traffic import Traffic
from devmapper.errors import (
    DevmapperError,
    PoolFull,
    PoolMismatch,
    ThinIdError,
    TransactionConflict,
)
from devmapper.thin.format import pack_mapping
from devmapper.thin.metadata import PoolMetadata
from devmapper.thin.space_map import Run
from devmapper.units import ThinId

if TYPE_CHECKING:
    from array import array

log = logging.getLogger(__name__)

_NOTHING_DONE: Final = (PoolFull, ThinIdError, TransactionConflict, PoolMismatch)


class MetadataFull(OSError):
    """ENOSPC: metadata are too full for a change, at least until the next commit.

    What a transaction has freed can be used after it.
    """


class GuardedMetadata:
    """The one way from the data path to `PoolMetadata`."""

    def __init__(
        self, metadata: PoolMetadata, state: PoolState, note_change: Callable[[], None]
    ) -> None:
        self._metadata = metadata
        self._state = state
        self._note_change = note_change
        self._lock = threading.Lock()
        self._committing = threading.Lock()  # taken before the metadata lock
        self._provisions = Traffic()
        self._caches: dict[ThinId, MappingCache] = {}
        self.published = 0  # how often mappings to newly written blocks were made

    @contextmanager
    def reading(self) -> Iterator[PoolMetadata]:
        """Hold the metadata lock for looking at something."""
        with self._lock:
            yield self._metadata

    @contextmanager
    def changing(self) -> Iterator[PoolMetadata]:
        """Hold the metadata lock for a change; `PoolUnusable` where the mode forbids it.

        After a failure that leaves the transaction in doubt the pool is read-only and at its last
        commit; the error goes on to the caller.  `PoolMetadata` keeps a reserve, so that metadata
        which are too full refuse a change before anything of it is done.
        """
        with self._lock:
            self._state.check_changeable()
            try:
                yield self._metadata
            except _NOTHING_DONE:
                raise
            except Exception as err:
                self._degrade(err)
                raise
        self._note_change()

    def follow(self, thin_id: ThinId, cache: MappingCache) -> None:
        """Keep *cache* up to date from now on; it is empty."""
        with self._lock:
            self._caches[thin_id] = cache

    def unfollow(self, thin_id: ThinId) -> None:
        with self._lock:
            self._caches.pop(thin_id, None)

    def load(self, thin_id: ThinId, number: int) -> "array[int]":
        """Look up chunk *number* of an open device, and keep it in its cache."""
        with self._lock:
            cache = self._caches.get(thin_id)
            chunk = None if cache is None else cache.chunks.get(number)
            if chunk is None:
                first = number << CHUNK_BITS
                with self._as_io_error(f"mappings of thin id {thin_id}"):
                    chunk = self._metadata.packed_range(thin_id, first, CHUNK_BLOCKS)
                if cache is not None:
                    cache.add(number, chunk)
            return chunk

    def provisioning(self) -> AbstractContextManager[None]:
        """No commit falls between `allocate` and `publish` inside the block.

        It would have allocated blocks that nothing refers to, and a crash would leave them so.
        """
        return self._provisions.inside()

    def allocate(self, wanted: int) -> list[int]:
        """Take up to *wanted* data blocks, none when the pool is out of data space."""
        with self._as_io_error("allocation"), self.changing() as metadata:
            count = min(wanted, metadata.nr_allocatable_data_blocks)
            return metadata.allocate_data_blocks(count) if count else []

    def give_back(self, blocks: Sequence[int]) -> None:
        """Undo `allocate` for blocks that were not published."""
        with self._as_io_error("allocation"), self.changing() as metadata:
            for block in blocks:
                metadata.dec_data_block(block)

    def publish(self, thin_id: ThinId, blocks: Sequence[int], data_blocks: Sequence[int]) -> None:
        """Map thin *blocks*, ascending, to *data_blocks* that hold what readers are to see."""
        with self._as_io_error("insertion"), self.changing() as metadata:
            metadata.insert_many(thin_id, list(zip(blocks, data_blocks, strict=True)))
            self.published += 1
            cache = self._caches.get(thin_id)
            if cache is not None:
                time = metadata.time
                for block, data_block in zip(blocks, data_blocks, strict=True):
                    cache.put(block, pack_mapping(data_block, time))

    def unmap(self, thin_id: ThinId, begin: int, end: int) -> None:
        """Remove the mappings of thin blocks *begin* to *end*."""
        with self._as_io_error("removal"), self.changing() as metadata:
            metadata.remove_range(thin_id, begin, end)
            cache = self._caches.get(thin_id)
            if cache is not None:
                cache.forget(begin, end)

    def commit(self, sync_data: Callable[[], None], seen: int) -> Sequence[Run]:
        """Commit what has changed; return the runs of data blocks that are free now.

        *sync_data* runs again when mappings were published after *seen*: no committed mapping leads
        to data that is not durable (`dm-thin.c: metadata_pre_commit_callback`).
        """
        with self._committing, self._provisions.stopped(), self._lock:
            if not self._state.writable or not self._metadata.changed:
                return ()
            try:
                if self.published != seen:
                    sync_data()
                return self._metadata.commit()
            except Exception as err:
                self._degrade(err)
                raise

    @contextmanager
    def uncommitted(self) -> Iterator[None]:
        """No commit happens inside the block, so what is on disk is the last one and stays it."""
        with self._committing:
            yield

    @property
    def nr_free_data_blocks(self) -> int:
        """For comparison with a mark only: read without the lock, so it may be of a moment ago."""
        return self._metadata.nr_free_data_blocks

    def release(self, runs: Sequence[Run]) -> None:
        """Let freed data blocks be allocated again."""
        with self._lock:
            self._metadata.release_data_blocks(runs)

    def degrade(self, cause: Exception) -> None:
        """Go back to the last commit and refuse writes, because of *cause*."""
        with self._lock:
            self._degrade(cause)

    def _degrade(self, cause: Exception) -> None:
        if not self._state.writable:
            return
        # Writers stop first: what they would write next may belong to nobody after the abort.
        self._state.make_read_only(str(cause), failed=True)
        try:
            self._metadata.abort()
        except (OSError, DevmapperError) as err:
            self._state.fail(f"{cause}; then, going back to the last commit: {err}")
        else:
            self._set_needs_check()
        for cache in self._caches.values():
            cache.clear()

    def _set_needs_check(self) -> None:
        try:
            self._metadata.set_needs_check(needs_check=True)
        except (OSError, DevmapperError) as err:
            log.error("pool %s: needs_check could not be stored: %s", self._state.name, err)  # noqa: TRY400

    @contextmanager
    def _as_io_error(self, what: str) -> Iterator[None]:
        """Errors of metadata as what a reader or writer gets: EIO, or ENOSPC when they are full."""
        try:
            yield
        except DevmapperError as err:
            reason = f"pool {self._state.name}: {what}: {err}"
            if isinstance(err, PoolFull):
                raise MetadataFull(errno.ENOSPC, reason) from err
            raise OSError(errno.EIO, reason) from err
