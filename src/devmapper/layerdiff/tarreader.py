"""Reading a tar stream once, front to back, in constant memory.

Stricter than the standard library's reader, which takes damage behind the first member for the
end of the archive.  Here everything that is not a whole archive is an `ArchiveError` that names
the entry in which it was noticed, or else the last good one.
"""

from array import array
from collections.abc import Iterator
from typing import Final

from devmapper.errors import ArchiveError
from devmapper.layerdiff import tarformat
from devmapper.layerdiff.compression import Decompressed
from devmapper.layerdiff.tarformat import BLOCK, ZERO_BLOCK, Entry, Header

CHUNK: Final = 1 << 20
_MAX_EXTENDED: Final = 16 << 20  # path, link and extended attributes of one entry
_MAX_RUNS: Final = 1 << 20  # of a sparse map: 16 MiB
_MAX_SIZE: Final = (1 << 63) - 1
_KNOWN: Final = (
    tarformat.FILE_TYPES
    | tarformat.WITHOUT_DATA
    | {
        tarformat.PAX,
        tarformat.PAX_SOLARIS,
        tarformat.PAX_GLOBAL,
        tarformat.GNU_LONG_NAME,
        tarformat.GNU_LONG_LINK,
        tarformat.GNU_DIRECTORY,
        tarformat.GNU_VOLUME,
    }
)
_LONG: Final = {tarformat.GNU_LONG_NAME: "path", tarformat.GNU_LONG_LINK: "linkpath"}


class _Extended:
    """What extended headers say about the entry that follows them."""

    def __init__(self, lasting: dict[str, bytes]) -> None:
        self.values = dict(lasting)
        self.runs: list[bytes] = []  # GNU sparse 0.0 repeats its keywords
        self.is_empty = True

    def add(self, records: list[tuple[str, bytes]]) -> None:
        self.is_empty = False
        for keyword, value in records:
            if keyword in ("GNU.sparse.offset", "GNU.sparse.numbytes"):
                self.runs.append(value)
            elif value or keyword.startswith(tarformat.XATTR_PREFIX):
                self.values[keyword] = value
            else:
                self.values.pop(keyword, None)  # POSIX: an empty value takes the keyword back

    def xattrs(self) -> dict[str, bytes]:
        return {
            tarformat.parse_xattr_name(keyword): value
            for keyword, value in self.values.items()
            if keyword.startswith(tarformat.XATTR_PREFIX)
        }

    def number(self, keyword: str, otherwise: int) -> int:
        value = self.values.get(keyword)
        return otherwise if value is None else tarformat.parse_decimal(value)


class TarReader:
    """Entries one by one; the content of the present one by `content`, before the next."""

    def __init__(self, stream: Decompressed) -> None:
        self._stream = stream
        self._last_good = ""
        self._present = ""
        self._globals: dict[str, bytes] = {}
        self._stored = 0  # bytes of content in the stream that were not read yet
        self._padding = 0
        self._runs = array("Q")
        self.buffer = bytearray(CHUNK)

    def __iter__(self) -> Iterator[Entry]:
        """Every entry; no byte at all is an archive without one, as for Docker (moby 18170)."""
        block = self._stream.read(BLOCK)
        if not block:
            return
        while True:
            extended = _Extended(self._globals)
            while (header := self._parse(block)) is not None and self._extends(header, extended):
                block = self._stream.read(BLOCK)
            if header is None:
                break
            if header.type == tarformat.GNU_VOLUME:
                self._skip(header.size + -header.size % BLOCK)
            else:
                entry = self._assemble(block, header, extended)
                yield entry
                self._skip(self._stored + self._padding)
                self._last_good = entry.name
            self._present = ""
            block = self._stream.read(BLOCK)
        if not extended.is_empty:
            raise self._damage("an extended header is followed by no entry")
        self._stream.drain()

    def content(self) -> Iterator[tuple[int, int]]:
        """Read the content into `buffer` piece by piece: offset in the file, length.

        What lies between the pieces is a hole.  The buffer is used again for each piece.
        """
        view = memoryview(self.buffer)
        for index in range(0, len(self._runs), 2):
            offset, left = self._runs[index], self._runs[index + 1]
            while left:
                length = min(left, CHUNK)
                if self._stream.readinto(view[:length]) != length:
                    raise self._damage("the stream ends within the content")
                self._stored -= length
                left -= length
                yield offset, length
                offset += length

    def _damage(self, reason: str) -> ArchiveError:
        if self._last_good:
            reason = f"{reason}; the last good entry is {self._last_good!r}"
        return ArchiveError(self._present, reason)

    def _skip(self, length: int) -> None:
        view = memoryview(self.buffer)
        while length:
            count = self._stream.readinto(view[: min(length, CHUNK)])
            if not count:
                raise self._damage("the stream ends within the content")
            length -= count

    def _read_exactly(self, length: int, what: str) -> bytes:
        data = self._stream.read(length)
        if len(data) != length:
            raise self._damage(f"the stream ends within {what}")
        return data

    def _parse(self, block: bytes) -> Header | None:
        """The header in *block*; None at the end of the archive."""
        if len(block) < BLOCK:
            raise self._damage(
                "the stream ends within a header" if block else "the archive has no end"
            )
        if block == ZERO_BLOCK:
            if self._stream.read(BLOCK) not in (b"", ZERO_BLOCK):
                raise self._damage("one empty block is followed by more than the end")
            return None
        if not tarformat.is_checksum_right(block):
            raise self._damage("a header is expected, but its checksum is wrong")
        try:
            header = tarformat.parse_header(block)
        except ValueError as err:
            raise self._damage(f"damaged header: {err}") from err
        if not 0 <= header.size <= _MAX_SIZE:
            raise self._damage(f"size {header.size} is out of range")
        if header.type not in _KNOWN:
            raise self._damage(f"kind of entry {header.type!r} is not known")
        return header

    def _extends(self, header: Header, extended: _Extended) -> bool:
        """Take in an extended header; false for any other."""
        if header.type in _LONG:
            name = self._read_extended(header).partition(b"\0")[0]
            extended.add([(_LONG[header.type], name)])
        elif header.type in (tarformat.PAX, tarformat.PAX_SOLARIS, tarformat.PAX_GLOBAL):
            try:
                records = tarformat.parse_pax(self._read_extended(header))
            except ValueError as err:
                raise self._damage(str(err)) from err
            if header.type == tarformat.PAX_GLOBAL:
                lasting = _Extended(self._globals)
                lasting.add(records)
                self._globals = lasting.values
                extended.values = {**self._globals, **extended.values}
            else:
                extended.add(records)
        else:
            return False
        return True

    def _read_extended(self, header: Header) -> bytes:
        if header.size > _MAX_EXTENDED:
            raise self._damage(f"an extended header has {header.size} bytes")
        data = self._read_exactly(header.size + -header.size % BLOCK, "an extended header")
        return data[: header.size]

    def _assemble(self, block: bytes, header: Header, extended: _Extended) -> Entry:
        values = extended.values
        name = values.get("GNU.sparse.name") or values.get("path") or header.name
        try:
            self._present = tarformat.decode_name(name)
            return self._complete(block, header, extended, name)
        except ValueError as err:
            raise self._damage(str(err)) from err

    def _complete(self, block: bytes, header: Header, extended: _Extended, name: bytes) -> Entry:
        values = extended.values
        kind = header.type
        stored = extended.number("size", header.size)
        if kind in tarformat.FILE_TYPES:
            # Before POSIX a directory was a file whose name ends with a slash.
            kind = tarformat.DIRECTORY if name.endswith(b"/") else tarformat.REGULAR
        has_data = header.type not in tarformat.WITHOUT_DATA
        self._stored = stored if has_data else 0
        if self._stored > _MAX_SIZE:
            raise ValueError(f"size {self._stored} is out of range")
        self._padding = -self._stored % BLOCK
        size = self._lay_out(block, header, extended) if kind == tarformat.REGULAR else stored
        mtime = values.get("mtime")
        return Entry(
            self._present,
            tarformat.DIRECTORY if kind == tarformat.GNU_DIRECTORY else kind,
            mode=header.mode & 0o7777,
            uid=extended.number("uid", header.uid),
            gid=extended.number("gid", header.gid),
            size=size,
            mtime_ns=header.mtime * 1_000_000_000 if mtime is None else tarformat.parse_time(mtime),
            link=tarformat.decode_name(values.get("linkpath") or header.link),
            dev_major=header.dev_major,
            dev_minor=header.dev_minor,
            xattrs=extended.xattrs(),
            complete_xattrs=values.get("comment") == tarformat.COMPLETE_XATTRS,
        )

    def _lay_out(self, block: bytes, header: Header, extended: _Extended) -> int:
        """Find where the pieces of a file's content belong; returns its size with the holes."""
        values = extended.values
        if header.type == tarformat.GNU_SPARSE:
            runs, size = self._old_sparse(block)
        elif values.get("GNU.sparse.major") == b"1":
            size = extended.number("GNU.sparse.realsize", 0)
            runs = self._stored_map()
        elif "GNU.sparse.map" in values or extended.runs:
            size = extended.number("GNU.sparse.size", 0)
            numbers = extended.runs or values["GNU.sparse.map"].split(b",")
            runs = array("Q", [tarformat.parse_decimal(number) for number in numbers])
        else:
            runs, size = array("Q", (0, self._stored)), self._stored
        self._check_runs(runs, size)
        self._runs = runs
        return size

    def _check_runs(self, runs: "array[int]", size: int) -> None:
        if len(runs) % 2:
            raise ValueError("the sparse map has an odd number of fields")
        end = total = 0
        for index in range(0, len(runs), 2):
            if runs[index] < end:
                raise ValueError("the sparse map goes backwards")
            end = runs[index] + runs[index + 1]
            total += runs[index + 1]
        if end > size or size > _MAX_SIZE or total != self._stored:
            raise ValueError("the sparse map does not fit the size of the file")

    def _old_sparse(self, block: bytes) -> tuple["array[int]", int]:
        piece, size = tarformat.parse_old_sparse(block)
        numbers = [number for run in piece.runs for number in run]
        runs = array("Q", map(_natural, numbers))
        while piece.extended:
            if len(runs) > 2 * _MAX_RUNS:
                raise ValueError("the sparse map is too long")
            piece = tarformat.parse_sparse_extension(self._read_exactly(BLOCK, "a sparse map"))
            runs.extend(_natural(number) for run in piece.runs for number in run)
        return runs, size

    def _stored_map(self) -> "array[int]":
        """GNU sparse 1.0: the map stands before the content, in decimal lines and whole blocks."""
        pending = b""
        numbers = array("Q")
        count = None
        while count is None or len(numbers) < 2 * count:
            if self._stored < BLOCK:
                raise ValueError("the sparse map is longer than the entry")
            lines = (pending + self._read_exactly(BLOCK, "a sparse map")).split(b"\n")
            self._stored -= BLOCK
            pending = lines.pop()
            for line in lines:
                if count is None:
                    count = tarformat.parse_decimal(line)
                    if count > _MAX_RUNS:
                        raise ValueError("the sparse map is too long")
                elif len(numbers) < 2 * count:
                    numbers.append(tarformat.parse_decimal(line))
        return numbers


def _natural(number: int) -> int:
    if not 0 <= number <= _MAX_SIZE:
        raise ValueError(f"number {number} in the sparse map is out of range")
    return number
