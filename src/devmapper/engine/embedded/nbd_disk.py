"""A block target as the clients of NBD see it: what each command does to it."""

import errno
import logging
from typing import Final

from devmapper.engine.embedded import nbd_format as nbd
from devmapper.engine.embedded.nbd_format import Allocation, Command, CommandFlag, TransmissionFlag
from devmapper.engine.embedded.nbd_handshake import Offer
from devmapper.engine.embedded.sectors import Sectors
from devmapper.engine.embedded.target import MappedTarget
from devmapper.units import SECTOR_SIZE

log = logging.getLogger(__name__)

_SECTOR_MASK: Final = SECTOR_SIZE - 1
_ZEROS: Final = memoryview(bytes(SECTOR_SIZE))
_MAX_PREFERRED: Final = 1024 * 1024
_CHANGES: Final = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
# Asked to write behind the end: there is no space.  To read there: that makes no sense
_FILLS: Final = frozenset({Command.WRITE, Command.WRITE_ZEROES})
_NOTHING_THERE: Final = int(Allocation.HOLE | Allocation.ZERO)
# A flush makes durable whatever any client was told is done, hence CAN_MULTI_CONN
_ABILITIES: Final = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
)


class NbdDisk:
    """One export; shared by all of its clients.

    Sectors are what is asked for (`Offer.minimum`), but a client that never asked may read and
    write any bytes.
    """

    def __init__(self, name: str, target: MappedTarget, *, read_only: bool) -> None:
        self.name = name
        self.read_only = read_only
        self._target = target
        self._size = int(target.size)
        self._sectors = Sectors(target)
        self._reported: set[type[Exception]] = set()

    def offer(self) -> Offer:
        # The largest power of two in the pool's block: a whole block costs no copy of the rest
        block = int(self._target.block_size)
        preferred = min(block & -block, _MAX_PREFERRED)
        flags = _ABILITIES | TransmissionFlag.READ_ONLY if self.read_only else _ABILITIES
        return Offer(self.name, self._size, flags, SECTOR_SIZE, preferred, nbd.MAX_PAYLOAD)

    def refusal(self, command: int, flags: int, offset: int, length: int) -> int:
        """The errno with which a request is refused before anything is done for it, or 0."""
        allowed = nbd.FLAGS_OF.get(command)
        if allowed is None or flags & ~allowed:
            return errno.EINVAL
        if self.read_only and command in _CHANGES:
            return errno.EPERM
        if offset + length > self._size:
            return errno.ENOSPC if command in _FILLS else errno.EINVAL
        return 0

    def perform(self, command: int, flags: int, offset: int, length: int, view: memoryview) -> int:
        """Do what was asked and not refused; the errno of it, or 0.  *view* is READ's or WRITE's.

        It may block: while the device is suspended, and while a full pool queues writes.
        """
        try:
            match command:
                case Command.READ:
                    self._read(offset, view)
                case Command.WRITE:
                    self._write(offset, view)
                case Command.TRIM:
                    self._trim(offset, length)
                case Command.WRITE_ZEROES:
                    self._write_zeroes(offset, length, keeps=bool(flags & CommandFlag.NO_HOLE))
                case _:
                    pass  # FLUSH
            if command == Command.FLUSH or (flags & CommandFlag.FUA and command in _CHANGES):
                self._target.flush()
        except OSError as err:
            return err.errno or errno.EIO
        except Exception as err:  # noqa: BLE001 - a bug of the target must not end the connection
            self._report(err)
            return errno.EIO
        return 0

    def block_status(self, flags: int, offset: int, length: int) -> tuple[int, bytes]:
        """Errno, and the extents of `base:allocation`: what is not mapped reads as zeros."""
        try:
            extents = self._target.extents(offset, length)
        except OSError as err:
            return err.errno or errno.EIO, b""
        except Exception as err:  # noqa: BLE001 - as in `perform`
            self._report(err)
            return errno.EIO, b""
        if flags & CommandFlag.REQ_ONE:
            del extents[1:]
        return 0, b"".join(
            nbd.EXTENT.pack(run, 0 if mapped else _NOTHING_THERE) for run, mapped in extents
        )

    def _read(self, offset: int, view: memoryview) -> None:
        if (offset | len(view)) & _SECTOR_MASK:
            self._sectors.read(offset, view)
        elif view:
            self._target.read(offset, view)

    def _write(self, offset: int, view: memoryview) -> None:
        if (offset | len(view)) & _SECTOR_MASK:
            self._sectors.write(offset, view)
        elif view:
            self._target.write(offset, view)

    def _trim(self, offset: int, length: int) -> None:
        """A hint: parts of sectors stay, and so does all where the pool ignores discards."""
        start, end = _inner(offset, length)
        if start >= end:
            return
        try:
            self._target.discard(start, end - start)
        except OSError as err:
            if err.errno != errno.EOPNOTSUPP:
                raise

    def _write_zeroes(self, offset: int, length: int, *, keeps: bool) -> None:
        start, end = _inner(offset, length)
        if start >= end:
            self._zero_edge(offset, offset + length)
            return
        self._zero_edge(offset, start)
        self._zero_edge(end, offset + length)
        if not keeps:
            try:
                self._target.discard(start, end - start)  # reads as zeros, and takes no space
                return
            except OSError as err:
                if err.errno != errno.EOPNOTSUPP:
                    raise
        self._target.write_zeroes(start, end - start)

    def _zero_edge(self, begin: int, end: int) -> None:
        """Zero a part that holds no whole sector; it may lie in two."""
        while begin < end:
            part = _ZEROS[: end - begin]
            self._sectors.write(begin, part)
            begin += len(part)

    def _report(self, error: Exception) -> None:
        kind = type(error)
        if kind in self._reported:
            log.debug("again in device %s: %r", self.name, error)
            return
        self._reported.add(kind)
        log.error("unexpected exception in device %s", self.name, exc_info=error)


def _inner(offset: int, length: int) -> tuple[int, int]:
    """The whole sectors of a range."""
    return -(-offset // SECTOR_SIZE) * SECTOR_SIZE, (offset + length) // SECTOR_SIZE * SECTOR_SIZE
