"""The tar format, byte for byte: ustar and GNU headers, PAX records.  No I/O, no policy.

Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual,
"Basic Tar Format" and "Storing Sparse Files".  Damage is a `ValueError` that says what is wrong.
"""

import os
import re
from struct import Struct
from typing import Final, NamedTuple

BLOCK: Final = 512
ZERO_BLOCK: Final = bytes(BLOCK)

REGULAR: Final = b"0"
REGULAR_V7: Final = b"\0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
CHARACTER: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"
CONTIGUOUS: Final = b"7"
PAX: Final = b"x"
PAX_SOLARIS: Final = b"X"
PAX_GLOBAL: Final = b"g"
GNU_LONG_NAME: Final = b"L"
GNU_LONG_LINK: Final = b"K"
GNU_SPARSE: Final = b"S"
GNU_DIRECTORY: Final = b"D"
GNU_VOLUME: Final = b"V"

FILE_TYPES: Final = frozenset({REGULAR, REGULAR_V7, CONTIGUOUS, GNU_SPARSE})
WITHOUT_DATA: Final = frozenset({HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO})

XATTR_PREFIX: Final = "SCHILY.xattr."

# A tar has no word for "these are all attributes of this directory".  Every reader of PAX ignores
# comments, so that one says it; without it the attributes of a directory that is there are kept.
COMPLETE_XATTRS: Final = b"devmapper: all extended attributes"

_HEADER: Final = Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")
_CHECKSUM: Final = slice(148, 156)
_STAR_TRAILER: Final = slice(508, 512)
_SPARSE_ITEM: Final = Struct("12s12s")
_OLD_SPARSE: Final = slice(386, 482)
_OLD_SPARSE_EXTENDED: Final = 482
_OLD_SPARSE_SIZE: Final = slice(483, 495)
_EXTENSION_SPARSE: Final = slice(0, 504)
_EXTENSION_EXTENDED: Final = 504
_NAME: Final = 100
_PREFIX: Final = 155
_MAX_OCTAL_7: Final = 0o7777777
_MAX_OCTAL_11: Final = 0o77777777777
_SECOND: Final = 1_000_000_000
_FIRST_NON_ASCII: Final = 0x80


class Header(NamedTuple):
    """One header block, as it stands; names are bytes, numbers are decoded."""

    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    type: bytes
    link: bytes
    dev_major: int
    dev_minor: int


class OldSparse(NamedTuple):
    """A piece of GNU's old sparse map, in a header or in the blocks that follow it."""

    runs: list[tuple[int, int]]
    extended: bool


class Entry(NamedTuple):
    """One member of an archive; *size* is that of its content, holes included.

    Names have no leading "/"; undecodable bytes are surrogates (`os.fsdecode`).
    """

    name: str
    type: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    link: str = ""
    dev_major: int = 0
    dev_minor: int = 0
    xattrs: dict[str, bytes] = {}  # noqa: RUF012 - never changed, and an entry is made per file
    complete_xattrs: bool = False


# -- reading -----------------------------------------------------------------------------------


def parse_number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 in two's complement when the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        return value - (1 << bits) if field[0] & 0x40 else value - (1 << (bits - 1))
    digits, _, _ = field.strip(b" \0").partition(b"\0")
    digits = digits.rstrip(b" ")
    if not digits:
        return 0
    if digits.translate(None, b"01234567"):
        raise ValueError(f"number field holds {digits[:20]!r}")
    return int(digits, 8)


def is_checksum_right(block: bytes) -> bool:
    """Whether the header's sum is right, over unsigned bytes or, as old tars did, signed ones."""
    try:
        wanted = parse_number(block[_CHECKSUM])
    except ValueError:
        return False
    total = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    if total == wanted:
        return True
    rest = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    return total - 256 * sum(byte >= _FIRST_NON_ASCII for byte in rest) == wanted


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def parse_header(block: bytes) -> Header:
    (
        name, mode, uid, gid, size, mtime, _checksum, kind, link, magic, _version,
        _user, _group, major, minor, prefix,
    ) = _HEADER.unpack(block)  # fmt: skip
    if magic == b"ustar\0":
        if block[_STAR_TRAILER] == b"tar\0":
            prefix = prefix[:131]  # star keeps times behind it
        if directory := _text(prefix):
            name = directory + b"/" + _text(name)
    has_device = kind in (CHARACTER, BLOCK_DEVICE)
    return Header(
        _text(name), parse_number(mode), parse_number(uid), parse_number(gid),
        parse_number(size), parse_number(mtime), kind, _text(link),
        parse_number(major) if has_device else 0, parse_number(minor) if has_device else 0,
    )  # fmt: skip


def _sparse_runs(table: bytes) -> list[tuple[int, int]]:
    runs = []
    for offset, length in _SPARSE_ITEM.iter_unpack(table):
        if not offset[0]:
            break
        runs.append((parse_number(offset), parse_number(length)))
    return runs


def parse_old_sparse(block: bytes) -> tuple[OldSparse, int]:
    """The map in a header of type `S`, and the real size of the file."""
    first = OldSparse(_sparse_runs(block[_OLD_SPARSE]), bool(block[_OLD_SPARSE_EXTENDED]))
    return first, parse_number(block[_OLD_SPARSE_SIZE])


def parse_sparse_extension(block: bytes) -> OldSparse:
    return OldSparse(_sparse_runs(block[_EXTENSION_SPARSE]), bool(block[_EXTENSION_EXTENDED]))


def parse_pax(data: bytes) -> list[tuple[str, bytes]]:
    """The records `length keyword=value` of an extended header, in order."""
    records = []
    position = 0
    while position < len(data):
        blank = data.find(b" ", position, position + 20)
        digits = data[position:blank]
        if blank < 0 or not digits.isdigit():
            raise ValueError(f"extended header has no length at byte {position}")
        end = position + int(digits)
        if end > len(data) or end <= blank + 1 or data[end - 1] != ord("\n"):
            raise ValueError(f"extended header record at byte {position} has a wrong length")
        keyword, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if not equals or not keyword:
            raise ValueError(f"extended header record at byte {position} has no keyword")
        records.append((os.fsdecode(keyword), value))
        position = end
    return records


def parse_decimal(value: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,20}", value):
        raise ValueError(f"number in extended header is {value[:20]!r}")
    return int(value)


def parse_time(value: bytes) -> int:
    """Nanoseconds from decimal seconds; a finer fraction is cut."""
    match = re.fullmatch(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?", value)
    if match is None:
        raise ValueError(f"time in extended header is {value[:40]!r}")
    sign, seconds, fraction = match.groups()
    total = int(seconds) * _SECOND + int((fraction or b"")[:9].ljust(9, b"0"))
    return -total if sign else total


def decode_name(name: bytes) -> str:
    if b"\0" in name:
        raise ValueError("a name holds a NUL byte")
    return os.fsdecode(name)


def parse_xattr_name(keyword: str) -> str:
    """The attribute's name in a keyword; `%3D` and `%25` as GNU tar spells `=` and `%`."""
    return keyword[len(XATTR_PREFIX) :].replace("%3D", "=").replace("%25", "%")


# -- writing -----------------------------------------------------------------------------------


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def encode(entry: Entry) -> bytes:
    """The header of *entry*, preceded by an extended one where ustar's fields cannot hold it."""
    records: list[tuple[bytes, bytes]] = []
    name = os.fsencode(entry.name)
    prefix, short = _split(name)
    if _needs_record(name) or not short:
        records.append((b"path", name))
        prefix, short = b"", name[:_NAME]
    link = os.fsencode(entry.link)
    if _needs_record(link) or len(link) > _NAME:
        records.append((b"linkpath", link))
    seconds, fraction = divmod(entry.mtime_ns, _SECOND)
    if fraction or not 0 <= seconds <= _MAX_OCTAL_11:
        records.append((b"mtime", _format_time(entry.mtime_ns)))
        seconds = seconds if 0 <= seconds <= _MAX_OCTAL_11 else 0
    numbers = []
    for keyword, value, limit in (
        (b"uid", entry.uid, _MAX_OCTAL_7),
        (b"gid", entry.gid, _MAX_OCTAL_7),
        (b"size", entry.size, _MAX_OCTAL_11),
    ):
        if value > limit:
            records.append((keyword, b"%d" % value))
        numbers.append(value if value <= limit else 0)
    for key in sorted(entry.xattrs):
        quoted = key.replace("%", "%25").replace("=", "%3D")
        records.append((os.fsencode(XATTR_PREFIX + quoted), entry.xattrs[key]))
    if entry.complete_xattrs:
        records.append((b"comment", COMPLETE_XATTRS))
    uid, gid, size = numbers
    header = _pack(
        short, entry.mode, uid, gid, size, seconds, entry.type, link[:_NAME],
        entry.dev_major, entry.dev_minor, prefix,
    )  # fmt: skip
    return _encode_pax(name, records) + header if records else header


def _needs_record(text: bytes) -> bool:
    """PAX records are UTF-8 by their definition: a name that is not stays in the plain field."""
    if text.isascii():
        return False
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Prefix and name of ustar; the name is empty when it does not fit."""
    if len(name) <= _NAME:
        return b"", name
    slash = name.rfind(b"/", 0, min(_PREFIX + 1, len(name) - 1))
    if slash <= 0 or len(name) - slash - 1 > _NAME:
        return b"", b""
    return name[:slash], name[slash + 1 :]


def _format_time(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, fraction = divmod(abs(nanoseconds), _SECOND)
    text = b"%s%d.%09d" % (sign, seconds, fraction)
    return text.rstrip(b"0").rstrip(b".")


def _encode_pax(name: bytes, records: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(_record(keyword, value) for keyword, value in records)
    base = name.rstrip(b"/").rpartition(b"/")[2]
    shown = (b"PaxHeaders.0/" + base)[:_NAME]
    header = _pack(shown, 0, 0, 0, len(body), 0, PAX, b"", 0, 0, b"")
    return header + body + padding(len(body))


def _record(keyword: bytes, value: bytes) -> bytes:
    rest = len(keyword) + len(value) + 3  # blank, equals sign, newline
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %b=%b\n" % (length, keyword, value)


def _pack(
    name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: bytes, link: bytes,
    major: int, minor: int, prefix: bytes,
) -> bytes:  # fmt: skip
    block = _HEADER.pack(
        name, b"%07o\0" % mode, b"%07o\0" % uid, b"%07o\0" % gid, b"%011o\0" % size,
        b"%011o\0" % mtime, b"        ", kind, link, b"ustar\0", b"00", b"", b"",
        b"%07o\0" % major, b"%07o\0" % minor, prefix,
    )  # fmt: skip
    return b"%b%06o\0 %b" % (
        block[: _CHECKSUM.start],
        sum(block),
        block[_CHECKSUM.stop :],
    )
