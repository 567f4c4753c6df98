"""Checksums of metadata blocks: crc32c as the kernel computes it, XORed with a salt per kind.

The kernel's `crc32c` neither takes nor gives the usual final inversion (`dm_bm_checksum`).
"""

from typing import Final, Protocol

from devmapper.errors import ChecksumError, FormatError
from devmapper.thin.format import CSUM_SIZE, BlockHeader, BlockKind, with_csum

_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli, reflected
_ALL_ONES: Final = 0xFFFFFFFF


class _Crc32c(Protocol):
    def __call__(self, data: bytes, /) -> int: ...


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        rest = byte
        for _ in range(8):
            rest = rest >> 1 ^ (_POLYNOMIAL if rest & 1 else 0)
        table.append(rest)
    return tuple(table)


_TABLE: Final = _make_table()


def crc32c_reference(data: bytes, /) -> int:
    """crc32c (RFC 3720) in plain Python, some hundred times slower: what the others must equal."""
    crc = _ALL_ONES
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ _ALL_ONES


def _fastest() -> _Crc32c:
    try:
        import google_crc32c
    except ImportError:
        return crc32c_reference
    accelerated: _Crc32c = google_crc32c.value
    return accelerated


crc32c: Final = _fastest()  # takes `bytes` only: its C version refuses other buffers


def block_csum(raw: bytes, kind: BlockKind) -> int:
    """The checksum that a metadata block of *kind* must carry."""
    return crc32c(raw[CSUM_SIZE:]) ^ _ALL_ONES ^ kind.salt


def seal(raw: bytes, kind: BlockKind) -> bytes:
    """Return the block with its checksum filled in."""
    return with_csum(raw, block_csum(raw, kind))


def check_block(raw: bytes, kind: BlockKind, block: int) -> None:
    """Raise unless *raw* is a sealed block of *kind* that belongs at *block*."""
    header = BlockHeader.unpack(raw)
    want = block_csum(raw, kind)
    if header.csum != want:
        raise ChecksumError(block, kind.name, want=want, got=header.csum)
    if header.blocknr != block:
        raise FormatError(block, f"blocknr of the {kind.name}", want=block, got=header.blocknr)
