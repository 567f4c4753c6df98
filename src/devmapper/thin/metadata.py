"""Pool metadata: thin devices, their mappings and the pool's data blocks, in transactions.

The counterpart of the kernel's `dm-thin-metadata.c`.  Every change belongs to a transaction, which
`commit` makes durable as a whole and `abort` undoes as a whole.

Not thread-safe: the caller serialises.  A method that raises `PoolFull`, a `ThinIdError`,
`TransactionConflict` or `PoolUnusable` has changed nothing.  After any other error in a method
that changes something, the transaction can only be aborted.
"""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Self

from devmapper.errors import (
    FormatError,
    PoolFull,
    PoolMismatch,
    PoolUnusable,
    Space,
    ThinIdExists,
    ThinIdMissing,
    TransactionConflict,
)
from devmapper.thin import checksum
from devmapper.thin import format as layout
from devmapper.thin.blocks import MetadataDevice
from devmapper.thin.format import (
    DeviceDetails,
    Mapping,
    SpaceMapRoot,
    Superblock,
    SuperblockFlags,
    pack_mapping,
    unpack_mapping,
)
from devmapper.thin.space_map import DataSpaceMap, MetadataSpaceMap, Run
from devmapper.thin.superblock import is_blank, new_superblock, read_superblock
from devmapper.thin.thin_devices import ThinDevices
from devmapper.thin.transaction_manager import DEFAULT_CACHE_BLOCKS, TransactionManager
from devmapper.units import Bytes, ThinId, TransactionId

__all__ = ["PoolMetadata", "is_blank"]

_MAX_RESERVE: Final = 1024  # as the kernel's: 4 MiB
_PATH: Final = 8  # blocks that a change of one path takes at most, splits and siblings included
_PER_LEAF: Final = 80  # entries that a leaf holds at least, with a margin
_OVERFLOW_BATCH: Final = 32
_NONE_MAPPED: Final = array("Q", (layout.UNMAPPED,))


class PoolMetadata:
    """One open pool; `open` and `format` make it, `close` lets go of the device uncommitted."""

    def __init__(
        self, device: MetadataDevice, *, read_only: bool, cache_blocks: int = DEFAULT_CACHE_BLOCKS
    ) -> None:
        self._device = device
        self._read_only = read_only
        self._tm = TransactionManager(device, cache_blocks=cache_blocks)
        self._aborting_only = False
        self._doubtful = False  # a superblock was written, but it may not have arrived
        self._changed = False
        self._committed: Superblock
        self._superblock: Superblock
        self._data: DataSpaceMap
        self._metadata: MetadataSpaceMap
        self._thins: ThinDevices

    @classmethod
    def format(
        cls, device: MetadataDevice, *, data_block_size: Bytes, nr_data_blocks: int
    ) -> "PoolMetadata":
        """Write the metadata of an empty pool; whatever the device held is lost."""
        self = cls(device, read_only=False)
        nr_blocks = min(device.nr_blocks, layout.MAX_METADATA_BLOCKS)
        self._metadata = MetadataSpaceMap.create(self._tm, nr_blocks)
        self._data = DataSpaceMap.create(self._tm, nr_data_blocks)
        self._thins = ThinDevices.create(self._tm, self._data)
        self._committed = self._superblock = new_superblock(
            data_block_size=data_block_size,
            metadata_nr_blocks=nr_blocks,
            data_mapping_root=self._thins.mapping_root,
            device_details_root=self._thins.details_root,
        )
        self._changed = True
        self.commit()
        return self

    @classmethod
    def open(
        cls,
        device: MetadataDevice,
        *,
        data_block_size: Bytes | None = None,
        read_only: bool = False,
        cache_blocks: int = DEFAULT_CACHE_BLOCKS,
    ) -> "PoolMetadata":
        """Open a pool at its last commit; `PoolMismatch` if its blocks have another size."""
        self = cls(device, read_only=read_only, cache_blocks=cache_blocks)
        superblock = read_superblock(device)
        if data_block_size is not None and superblock.block_size != data_block_size:
            raise PoolMismatch(
                f"data blocks of the pool have {superblock.block_size} bytes,"
                f" but {data_block_size} were asked for"
            )
        if superblock.compat_ro_flags & ~layout.COMPAT_RO_SUPPORTED and not read_only:
            raise FormatError(
                layout.SUPERBLOCK_LOCATION,
                "compat_ro_flags",
                want=layout.COMPAT_RO_SUPPORTED,
                got=superblock.compat_ro_flags,
            )
        self._load(superblock)
        return self

    def _load(self, superblock: Superblock) -> None:
        self._committed = self._superblock = superblock
        metadata_root = SpaceMapRoot.unpack(superblock.metadata_space_map_root)
        if metadata_root.nr_blocks > self._device.nr_blocks:
            raise PoolMismatch(
                f"metadata device has {self._device.nr_blocks} blocks,"
                f" but the pool uses {metadata_root.nr_blocks}"
            )
        self._metadata = MetadataSpaceMap.open(self._tm, metadata_root)
        self._data = DataSpaceMap.open(
            self._tm, SpaceMapRoot.unpack(superblock.data_space_map_root)
        )
        self._thins = ThinDevices(
            self._tm, self._data, superblock.data_mapping_root, superblock.device_details_root
        )

    def close(self) -> None:
        """Close the device; what was not committed is lost, as in a crash."""
        self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The pool

    @property
    def superblock(self) -> Superblock:
        """As of the last commit."""
        return self._committed

    @property
    def transaction_id(self) -> TransactionId:
        return self._superblock.trans_id

    @property
    def time(self) -> int:
        return self._superblock.time

    @property
    def data_block_size(self) -> Bytes:
        return self._superblock.block_size

    @property
    def nr_data_blocks(self) -> int:
        return self._data.nr_blocks

    @property
    def nr_free_data_blocks(self) -> int:
        """Without a reference; some may have to be committed or released before they are used."""
        return self._data.nr_free

    @property
    def nr_allocatable_data_blocks(self) -> int:
        return self._data.nr_allocatable

    @property
    def nr_metadata_blocks(self) -> int:
        return self._metadata.nr_blocks

    @property
    def nr_free_metadata_blocks(self) -> int:
        return self._metadata.nr_free

    @property
    def metadata_reserve(self) -> int:
        """Free metadata blocks that only deleting and committing may use.

        As large as the kernel's, and enough to delete any thin device.
        """
        as_kernel = min(_MAX_RESERVE, self._metadata.nr_blocks // 10)
        return max(as_kernel, self._delete_cost(self._data.nr_allocated) - 2 * _PATH)

    @property
    def held_root(self) -> int | None:
        """Block of the metadata snap."""
        return self._superblock.held_root or None

    @property
    def needs_check(self) -> bool:
        return self._superblock.needs_check

    @property
    def changed(self) -> bool:
        """Is there anything to commit?"""
        return self._changed

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        if self.transaction_id != expected:
            raise TransactionConflict(self.transaction_id, expected)
        with self._change(0):
            self._superblock = self._superblock._replace(trans_id=new)

    def set_needs_check(self, *, needs_check: bool) -> None:
        """Write the flag at once, apart from the transaction, which may have failed."""
        self._refuse_if_read_only()
        flags = SuperblockFlags.NEEDS_CHECK if needs_check else SuperblockFlags(0)
        self._write_superblock(self._committed._replace(flags=flags))
        self._superblock = self._superblock._replace(flags=flags)

    def resize_data(self, nr_blocks: int) -> None:
        """Have *nr_blocks* data blocks from now on; `PoolMismatch` if that is less than before."""
        if nr_blocks < self._data.nr_blocks:
            raise PoolMismatch(
                f"pool has {self._data.nr_blocks} data blocks and cannot shrink to {nr_blocks}"
            )
        more = nr_blocks // layout.ENTRIES_PER_BITMAP + 1 - self._data.nr_bitmaps
        with self._change(more + more // 50 + _PATH):
            self._data.grow(nr_blocks)

    def resize_metadata(self, nr_blocks: int) -> None:
        """Use *nr_blocks* of the metadata device, which has grown; more than the cap is cut."""
        nr_blocks = min(nr_blocks, layout.MAX_METADATA_BLOCKS)
        if not self._metadata.nr_blocks <= nr_blocks <= self._device.nr_blocks:
            raise PoolMismatch(
                f"pool uses {self._metadata.nr_blocks} of {self._device.nr_blocks} metadata"
                f" blocks, {nr_blocks} is not between them"
            )
        # Needs no room beforehand: it makes what it needs.
        with self._change(None):
            self._metadata.grow(nr_blocks)

    def reserve_metadata_snap(self) -> list[Run]:
        """Commit, then keep what is committed as the metadata snap.

        Return the freed runs of that commit.  The metadata snap itself is durable at the next one.
        """
        if self.held_root is not None:
            raise PoolMismatch("pool already has a metadata snap")
        freed = self.commit()
        with self._change(_PATH):
            counts = self._tm.counts
            unused = bytes(layout.SPACE_MAP_ROOT_SIZE)
            block = self._tm.allocate()
            copy = self._committed._replace(
                blocknr=block, data_space_map_root=unused, metadata_space_map_root=unused
            )
            self._tm.write_block(block, layout.SUPERBLOCK, copy.pack())
            counts.inc(copy.data_mapping_root)
            counts.inc(copy.device_details_root)
            self._superblock = self._superblock._replace(held_root=block)
        return freed

    def release_metadata_snap(self) -> None:
        held = self.held_root
        if held is None:
            raise PoolMismatch("pool has no metadata snap")
        raw = self._tm.read_block(held)
        checksum.check_block(raw, layout.SUPERBLOCK, held)
        copy = Superblock.unpack(raw)
        with self._change(self._delete_cost(self._data.nr_allocated), reserve=0):
            self._thins.delete_trees(copy.data_mapping_root, copy.device_details_root)
            self._tm.dec(held)
            self._superblock = self._superblock._replace(held_root=0)

    # Thin devices

    def thin_ids(self) -> list[ThinId]:
        """All thin ids, ascending."""
        return [ThinId(thin_id) for thin_id in sorted(self._thins.ids())]

    def details(self, thin_id: ThinId) -> DeviceDetails:
        details = self._thins.find_details(thin_id)
        if details is None:
            raise ThinIdMissing(thin_id)
        return details

    def create_thin(self, thin_id: ThinId) -> None:
        if self._thins.find_details(thin_id) is not None:
            raise ThinIdExists(thin_id)
        with self._change(2 * _PATH):
            details = DeviceDetails(0, self.transaction_id, self.time, self.time)
            self._thins.add(thin_id, self._thins.mappings.create(), details)

    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        """Let *thin_id* have what *origin* has; from now on both copy before they write."""
        if self._thins.find_details(thin_id) is not None:
            raise ThinIdExists(thin_id)
        of_origin = self.details(origin)
        with self._change(3 * _PATH):
            time = self.time + 1
            self._superblock = self._superblock._replace(time=time)
            details = DeviceDetails(of_origin.mapped_blocks, self.transaction_id, time, time)
            self._thins.add(thin_id, self._thins.share_root(origin), details)
            self._thins.set_details(origin, of_origin._replace(snapshotted_time=time))

    def delete(self, thin_id: ThinId) -> None:
        details = self.details(thin_id)
        with self._change(self._delete_cost(details.mapped_blocks), reserve=0):
            self._thins.delete(thin_id)

    # Mappings

    def find(self, thin_id: ThinId, block: int) -> Mapping | None:
        packed = self._thins.mappings.lookup(self._thins.root(thin_id), block)
        return None if packed is None else unpack_mapping(packed)

    def find_packed(
        self, thin_id: ThinId, begin: int, end: int
    ) -> Iterator[tuple["array[int]", Sequence[int]]]:
        """Mapped blocks from *begin* until before *end* with their packed mappings, by leaf."""
        for keys, values in self._thins.mappings.leaves(self._thins.root(thin_id), begin, end):
            yield keys, values
            self._tm.trim()

    def find_range(self, thin_id: ThinId, begin: int, end: int) -> Iterator[tuple[int, Mapping]]:
        for keys, values in self.find_packed(thin_id, begin, end):
            yield from zip(keys, map(unpack_mapping, values), strict=True)

    def packed_range(self, thin_id: ThinId, begin: int, length: int) -> "array[int]":
        """Packed mappings of *length* blocks; `format.UNMAPPED` where there is none."""
        packed = _NONE_MAPPED * length
        for keys, values in self.find_packed(thin_id, begin, begin + length):
            first = keys[0] - begin
            if keys[-1] - keys[0] == len(keys) - 1:
                packed[first : first + len(keys)] = array("Q", values)
                continue
            for key, value in zip(keys, values, strict=True):
                packed[key - begin] = value
        return packed

    def is_shared(self, thin_id: ThinId, mapping: Mapping) -> bool:
        """May another thin device refer to the block: has it been snapshotted since?"""
        return self.details(thin_id).snapshotted_time > mapping.time

    def insert(self, thin_id: ThinId, block: int, data_block: int) -> None:
        """Map *block* to *data_block*, whose reference passes to the mapping."""
        self.insert_many(thin_id, ((block, data_block),))

    def insert_many(self, thin_id: ThinId, blocks: Sequence[tuple[int, int]]) -> None:
        """Map ascending blocks to data blocks; data blocks that are replaced lose a reference."""
        details = self.details(thin_id)
        if not blocks:
            return
        time = self.time
        keys = array("Q", [block for block, _ in blocks])
        values = array("Q", [pack_mapping(data_block, time) for _, data_block in blocks])
        cost = 3 * _PATH + len(keys) // _PER_LEAF
        if len(keys) > 1:
            root = self._thins.root(thin_id)
            cost += min(len(keys), self._thins.mappings.count_leaves(root, keys[0], keys[-1] + 1))
        with self._change(cost):
            root = self._thins.own_root(thin_id)
            inserted = self._thins.mappings.insert_many(root, keys, values)
            self._thins.set_root(thin_id, inserted.root)
            mapped = details.mapped_blocks + inserted.added
            self._thins.set_details(thin_id, details._replace(mapped_blocks=mapped))

    def remove(self, thin_id: ThinId, block: int) -> bool:
        """Unmap one block; False if it was not mapped."""
        return bool(self.remove_range(thin_id, block, block + 1))

    def remove_range(self, thin_id: ThinId, begin: int, end: int) -> int:
        """Unmap every block from *begin* until before *end*; return how many were mapped."""
        details = self.details(thin_id)
        root = self._thins.root(thin_id)
        if next(self._thins.mappings.leaves(root, begin, end), None) is None:
            return 0
        most = min(details.mapped_blocks, end - begin)
        with self._change(2 * _PATH + self._delete_cost(most), reserve=0):
            root = self._thins.own_root(thin_id)
            left = self._thins.mappings.remove_range(root, begin, end)
            self._thins.set_root(thin_id, left.root)
            mapped = details.mapped_blocks - left.removed
            self._thins.set_details(thin_id, details._replace(mapped_blocks=mapped))
        return left.removed

    def mapped_blocks(self, thin_id: ThinId) -> int:
        return self.details(thin_id).mapped_blocks

    def highest_mapped_block(self, thin_id: ThinId) -> int | None:
        return self._thins.mappings.last_key(self._thins.root(thin_id))

    # Data blocks

    def allocate_data_block(self) -> int:
        """Take a free data block; it has one reference, which the next `insert` takes over."""
        with self._change(0):
            return self._data.allocate()

    def allocate_data_blocks(self, length: int) -> list[int]:
        """Take *length* free data blocks, ascending, contiguous where that is possible."""
        with self._change(length // layout.ENTRIES_PER_BITMAP + 1):
            return self._data.allocate_many(length)

    def data_ref_count(self, data_block: int) -> int:
        return self._data.count(data_block)

    def inc_data_block(self, data_block: int) -> None:
        with self._change(0):
            self._data.inc(data_block)

    def dec_data_block(self, data_block: int) -> None:
        with self._change(0, reserve=0):
            self._data.dec(data_block)

    def release_data_blocks(self, runs: Sequence[Run]) -> None:
        """Blocks that a commit reported as freed may be allocated from now on."""
        self._data.release(runs)

    # Transactions

    def commit(self) -> list[Run]:
        """Make the transaction durable; return the runs of data blocks that it freed.

        They stay out of use until `release_data_blocks`.
        """
        if not self._changed:
            return []
        self._refuse_if_read_only()
        if self._aborting_only:
            raise PoolUnusable("fail", "an operation failed half-way; abort the transaction")
        with self._half_done_on_error():
            self._thins.flush()
            data_root = self._data.flush()
            metadata_root = self._metadata.flush()
            superblock = self._superblock._replace(
                data_space_map_root=data_root.pack(),
                metadata_space_map_root=metadata_root.pack(),
                data_mapping_root=self._thins.mapping_root,
                device_details_root=self._thins.details_root,
            )
            self._tm.write_back()
            self._write_superblock(superblock)
        self._superblock = self._committed
        self._thins.committed()
        self._tm.committed()
        self._metadata.committed()
        freed = self._data.committed()
        self._changed = False
        self._trim()
        return freed

    def abort(self) -> None:
        """Go back to the last commit; blocks not yet released stay held back."""
        if self._doubtful:
            # Either version is whole; the next transaction must know which one it builds on.
            self._write_superblock(self._committed)
        held = self._data.held()
        self._tm.abort()
        self._load(self._committed)
        self._data.hold(held)
        self._changed = self._aborting_only = False

    @contextmanager
    def _change(self, cost: int | None, *, reserve: int | None = None) -> Iterator[None]:
        """Enter a change that takes *cost* metadata blocks at most (None: it brings its own).

        `PoolFull` unless they, what a commit takes and the reserve are free.
        """
        self._refuse_if_read_only()
        if self._aborting_only:
            raise PoolUnusable("fail", "an operation failed half-way; abort the transaction")
        with self._half_done_on_error():
            self._trim()
        if cost is not None:
            needed = cost + self._commit_cost()
            needed += self.metadata_reserve if reserve is None else reserve
            if needed > self._metadata.nr_allocatable:
                raise PoolFull(Space.METADATA, free=self._metadata.nr_allocatable, needed=needed)
        with self._half_done_on_error():
            yield
        self._changed = True

    @contextmanager
    def _half_done_on_error(self) -> Iterator[None]:
        try:
            yield
        except PoolFull as err:
            # Data space is asked for before anything else is done.
            self._aborting_only = err.kind is Space.METADATA
            raise
        except BaseException:
            self._aborting_only = self._changed = True
            raise

    def _refuse_if_read_only(self) -> None:
        if self._read_only:
            raise PoolUnusable("ro", "it was opened read-only")

    def _trim(self) -> None:
        if self._data.nr_overflow_changes > _OVERFLOW_BATCH:
            self._data.flush_overflow()
        if self._metadata.nr_overflow_changes > _OVERFLOW_BATCH:
            self._metadata.flush_overflow()
        self._tm.trim()
        self._data.trim()

    def _commit_cost(self) -> int:
        trees = 2 * _PATH + self._thins.nr_unflushed
        return trees + self._data.flush_cost(1) + self._metadata.flush_cost()

    def _delete_cost(self, mapped: int) -> int:
        """What letting go of *mapped* mappings takes: counts and bitmaps of data blocks."""
        overflow = self._data.overflow_cost(mapped, growing=False)
        return 2 * _PATH + overflow + self._data.flush_cost(mapped) - self._data.flush_cost()

    def _write_superblock(self, superblock: Superblock) -> None:
        raw = checksum.seal(superblock.pack(), layout.SUPERBLOCK)
        self._doubtful = True
        self._device.write(layout.SUPERBLOCK_LOCATION, raw)
        self._device.flush()
        self._doubtful = False
        self._committed = Superblock.unpack(raw)
