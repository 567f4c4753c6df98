"""An open thin device: reads, writes, discards and flushes, as dm-thin does them.

Three ways through it:

- The common request lies in one block whose mapping is cached.  It takes no lock.
- Reads and writes in place of any length: pieces that lie next to each other on the data device go
  in one call.
- What changes mappings: provisioning, breaking sharing, unmapping.  One thread at a time for each
  device (`_changes`), everything looked up anew, data before the mapping.

Whoever waits for data space holds nothing and counts as not begun: suspending, snapshots and the
release of freed blocks go on meanwhile.
"""

import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

from devmapper.engine.embedded.core import PoolCore
from devmapper.engine.embedded.data_file import COPY_LENGTH, ZEROS
from devmapper.engine.embedded.guarded_metadata import MetadataFull
from devmapper.engine.embedded.mapping_cache import (
    CHUNK_BITS,
    CHUNK_BLOCKS,
    CHUNK_MASK,
    TIME_BITS,
    TIME_MASK,
    MappingCache,
)
from devmapper.engine.embedded.traffic import Traffic
from devmapper.thin.format import UNMAPPED
from devmapper.units import Bytes, ThinId

_STATUS_CHUNKS = 4  # of mappings that one question may load


class _Piece(NamedTuple):
    """The part of a request that lies in one block."""

    block: int
    raw: int  # mapping or UNMAPPED
    begin: int  # inside the block
    length: int
    place: int  # inside the request


class ThinDevice:
    """A `BlockTarget`; made by `EmbeddedPool.open_device`.  `close` is idempotent."""

    def __init__(
        self,
        core: PoolCore,
        thin_id: ThinId,
        size: Bytes,
        on_close: "Callable[[ThinDevice], None]",
    ) -> None:
        self.thin_id = thin_id
        self._on_close = on_close
        self.traffic = Traffic()
        self.cache = MappingCache()
        self.snapshotted_time = 0  # mappings older than this are shared
        self._core = core
        self._size = size
        self._block_size = core.block_size
        self._chunks = self.cache.chunks
        self._data = core.data
        self._state = core.state
        self._changes = threading.Lock()

    @property
    def size(self) -> Bytes:
        return self._size

    @property
    def block_size(self) -> Bytes:
        return Bytes(self._block_size)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill *view*; EIO beyond the end, or when data or metadata cannot be read."""
        traffic = self.traffic
        side = traffic.side
        side.append(None)
        if traffic.held:
            side = traffic.readmit(side)
        try:
            length = len(view)
            block_size = self._block_size
            block = offset // block_size
            begin = offset - block * block_size
            if begin + length <= block_size and offset + length <= self._size:
                chunk = self._chunks.get(block >> CHUNK_BITS)
                if chunk is not None:
                    raw = chunk[block & CHUNK_MASK]
                    if raw == UNMAPPED:
                        _fill_with_zeros(view)
                    else:
                        self._data.read(view, (raw >> TIME_BITS) * block_size + begin)
                    return
            self._read_pieces(offset, view)
        finally:
            traffic.leave(side)

    def write(self, offset: int, view: memoryview) -> None:
        """Store *view*; ENOSPC when pool or data device stay full, EIO or EROFS by pool mode."""
        traffic = self.traffic
        side = traffic.side
        side.append(None)
        if traffic.held:
            side = traffic.readmit(side)
        try:
            length = len(view)
            block_size = self._block_size
            block = offset // block_size
            begin = offset - block * block_size
            if begin + length <= block_size and offset + length <= self._size:
                chunk = self._chunks.get(block >> CHUNK_BITS)
                if chunk is not None and self._state.writable:
                    raw = chunk[block & CHUNK_MASK]
                    if raw != UNMAPPED and raw & TIME_MASK >= self.snapshotted_time:
                        self._data.write(view, (raw >> TIME_BITS) * block_size + begin)
                        return
        finally:
            traffic.leave(side)
        self._write_slowly(offset, view)

    def flush(self) -> None:
        """Return when everything written so far is durable, with the mappings that lead to it."""
        with self.traffic.inside():
            pass  # waits while suspended
        self._core.commits.run()

    def discard(self, offset: int, length: int) -> None:
        """Unmap whole blocks; what is covered of others is zeroed.  EOPNOTSUPP if ignored."""
        if self._core.table.ignore_discard:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._check_range(offset, length)
        block_size = self._block_size
        end = offset + length
        first = -(-offset // block_size)
        # Nobody sees what is behind the end of the device, so its last block counts as covered.
        last = -(-end // block_size) if end == self._size else end // block_size
        if first > last:
            self._zero(offset, length)
            return
        if first < last:
            self._unmap(first, last)
        head = first * block_size - offset
        self._zero(offset, min(head, length))
        if last * block_size < end:
            self._zero(last * block_size, end - last * block_size)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros; what is mapped stays so, what is not stays unmapped."""
        self._check_range(offset, length)
        self._zero(offset, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Lengths from *offset* on, each with whether it is mapped; of 1 GiB or so at a time."""
        self._check_range(offset, length)
        length = min(length, _STATUS_CHUNKS * CHUNK_BLOCKS * self._block_size)
        found: list[tuple[int, bool]] = []
        with self.traffic.inside():
            for piece in self._pieces(offset, length):
                mapped = piece.raw != UNMAPPED
                if found and found[-1][1] == mapped:
                    found[-1] = (found[-1][0] + piece.length, mapped)
                else:
                    found.append((piece.length, mapped))
        return found

    def suspend(self) -> None:
        """Hold new I/O back, wait for what is under way and commit; `resume` undoes one call."""
        self.traffic.hold()
        try:
            self._core.commits.run()
        except BaseException:
            self.traffic.let_go()
            raise

    def resume(self) -> None:
        self.traffic.let_go()

    def close(self) -> None:
        """Wait for what is under way and give the device back; I/O fails from now on."""
        self.traffic.close()
        self._state.wake()  # writes that wait for space give up
        self._on_close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self._size:
            raise OSError(
                errno.EIO,
                f"{length} bytes at {offset} end behind the {self._size} bytes"
                f" of thin id {self.thin_id}",
            )

    def _pieces(self, offset: int, length: int) -> Iterator[_Piece]:
        chunks, block_size = self._chunks, self._block_size
        place = 0
        block, begin = divmod(offset, block_size)
        while place < length:
            chunk = chunks.get(block >> CHUNK_BITS)
            if chunk is None:
                chunk = self._core.metadata.load(self.thin_id, block >> CHUNK_BITS)
            size = min(block_size - begin, length - place)
            yield _Piece(block, chunk[block & CHUNK_MASK], begin, size, place)
            place += size
            block += 1
            begin = 0

    def _runs(self, pieces: Sequence[_Piece]) -> Iterator[tuple[int, int, int]]:
        """Join pieces that follow each other: place in the request, length, place in the data.

        The last is -1 for what is not mapped.
        """
        begin = length = 0
        at = -1
        for piece in pieces:
            here = -1
            if piece.raw != UNMAPPED:
                here = (piece.raw >> TIME_BITS) * self._block_size + piece.begin
            if length and begin + length == piece.place and here == (-1 if at < 0 else at + length):
                length += piece.length
                continue
            if length:
                yield begin, length, at
            begin, length, at = piece.place, piece.length, here
        if length:
            yield begin, length, at

    def _read_pieces(self, offset: int, view: memoryview) -> None:
        self._check_range(offset, len(view))
        for begin, length, at in self._runs(list(self._pieces(offset, len(view)))):
            if at < 0:
                _fill_with_zeros(view[begin : begin + length])
            else:
                self._data.read(view[begin : begin + length], at)

    def _write_slowly(self, offset: int, view: memoryview) -> None:
        self._check_range(offset, len(view))
        while True:
            done = self._retried(functools.partial(self._write_pieces, offset, view))
            if done == len(view):
                return
            offset += done
            view = view[done:]
            self._core.wait_for_space(self.traffic)

    def _write_pieces(self, offset: int, view: memoryview) -> int:
        """Write, and map what is not writable yet; less than everything is out of space."""
        with self.traffic.inside():
            return self._write_pieces_inside(offset, view)

    def _write_pieces_inside(self, offset: int, view: memoryview) -> int:
        with self._changes:
            self._state.check_writable()
            pieces = list(self._pieces(offset, len(view)))
            fresh = [piece for piece in pieces if not self._is_writable(piece.raw)]
            if fresh:
                done = self._provision(fresh, view)
                if done < len(fresh):
                    pieces = [piece for piece in pieces if piece.place < fresh[done].place]
        for begin, length, at in self._runs([p for p in pieces if self._is_writable(p.raw)]):
            self._data.write(view[begin : begin + length], at)
        return pieces[-1].place + pieces[-1].length if pieces else 0

    def _retried(self, step: Callable[[], int]) -> int:
        """Run *step*, once more after a commit if metadata were too full for it."""
        try:
            return step()
        except MetadataFull:
            self._core.commits.run()
            return step()

    def _is_writable(self, raw: int) -> bool:
        return raw != UNMAPPED and raw & TIME_MASK >= self.snapshotted_time

    def _provision(self, pieces: Sequence[_Piece], view: memoryview | None) -> int:
        """Write *pieces* of *view* (zeros if None) to new data blocks, then map these.

        Return for how many of them there was space.
        """
        metadata = self._core.metadata
        with metadata.provisioning():
            granted = self._core.allocate(len(pieces))
            pieces = pieces[: len(granted)]
            if not pieces:
                return 0
            try:
                self._fill(pieces, granted, view)
                metadata.publish(self.thin_id, [piece.block for piece in pieces], granted)
            except BaseException:
                if self._state.writable:
                    metadata.give_back(granted)
                raise
        return len(pieces)

    def _fill(
        self, pieces: Sequence[_Piece], granted: Sequence[int], view: memoryview | None
    ) -> None:
        block_size = self._block_size
        whole: list[_Piece] = []
        for piece, data_block in zip(pieces, granted, strict=True):
            if view is not None and piece.length == block_size:
                whole.append(piece._replace(raw=data_block << TIME_BITS))
            else:
                self._fill_partly(piece, data_block * block_size, view)
        if view is not None:
            for begin, length, at in self._runs(whole):
                self._data.write(view[begin : begin + length], at)

    def _fill_partly(self, piece: _Piece, target: int, view: memoryview | None) -> None:
        """Write *piece* to the new block at *target*, and around it what readers saw until now."""
        data, block_size = self._data, self._block_size
        end = piece.begin + piece.length
        if piece.raw != UNMAPPED:
            source = (piece.raw >> TIME_BITS) * block_size
            if view is not None and block_size <= COPY_LENGTH:
                copy = memoryview(bytearray(block_size))
                data.read(copy, source)
                copy[piece.begin : end] = view[piece.place : piece.place + piece.length]
                data.write(copy, target)
                return
            data.copy(source, target, piece.begin)
            data.copy(source + end, target + end, block_size - end)
        elif self._core.clears_new_blocks:
            data.clear(target, piece.begin)
            data.clear(target + end, block_size - end)
        if view is None:
            data.clear(target + piece.begin, piece.length)
        else:
            data.write(view[piece.place : piece.place + piece.length], target + piece.begin)

    def _unmap(self, begin: int, end: int) -> None:
        while begin < end:
            begin = self._retried(functools.partial(self._unmap_first, begin, end))

    def _unmap_first(self, begin: int, end: int) -> int:
        """Unmap so much that others do not wait for long; return where to go on."""
        end = min(end, begin + CHUNK_BLOCKS)
        with self.traffic.inside(), self._changes:
            self._state.check_writable()
            self._core.metadata.unmap(self.thin_id, begin, end)
        return end

    def _zero(self, offset: int, length: int) -> None:
        """Zero what is mapped of a range, one block after the other."""
        end = offset + length
        while offset < end:
            done = self._retried(functools.partial(self._zero_first, offset, end - offset))
            offset += done
            if not done:
                self._core.wait_for_space(self.traffic)

    def _zero_first(self, offset: int, length: int) -> int:
        """Zero the part of the range that lies in its first block; 0 is out of space."""
        with self.traffic.inside(), self._changes:
            self._state.check_writable()
            piece = next(self._pieces(offset, length))
            return piece.length if self._zero_piece(piece) else 0

    def _zero_piece(self, piece: _Piece) -> bool:
        if piece.raw == UNMAPPED:
            return True
        at = (piece.raw >> TIME_BITS) * self._block_size + piece.begin
        if self._is_writable(piece.raw):
            self._data.zero(at, piece.length)
            return True
        if self._data.is_zero(at, piece.length):
            return True
        return self._provision([piece], None) == 1


def _fill_with_zeros(view: memoryview) -> None:
    for begin in range(0, len(view), len(ZEROS)):
        part = view[begin : begin + len(ZEROS)]
        part[:] = ZEROS[: len(part)]
