"""Integers with a meaning, the sizes people type, and the sizes people read.

The one place that knows how a size is spelled.  No I/O.
"""

import re
from typing import Final, NewType

from devmapper.errors import UsageError

Bytes = NewType("Bytes", int)
Sectors = NewType("Sectors", int)  # of 512 bytes, whatever the disk says
ThinId = NewType("ThinId", int)  # 24 bit, `dm_thin_id`
TransactionId = NewType("TransactionId", int)  # 64 bit, of user space, in the superblock

SECTOR_SIZE: Final = 512
MAX_THIN_ID: Final = 0xFFFFFF
MIN_DATA_BLOCK_SIZE: Final = Bytes(64 * 1024)  # DATA_DEV_BLOCK_SIZE_MIN_SECTORS
MAX_DATA_BLOCK_SIZE: Final = Bytes(1024**3)  # DATA_DEV_BLOCK_SIZE_MAX_SECTORS
MAX_METADATA_SIZE: Final = Bytes(255 * ((4096 - 16) * 4) * 4096)  # THIN_METADATA_MAX_SECTORS
MAX_METADATA_DEVICE: Final = Bytes(16 * 1024**3)  # what may be given; the rest stays unused
KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3

_SIZE: Final = re.compile(
    r"(\d{1,99})(?:\.(\d{1,99}))? ?(?:([kmgtp])i?)?b?", re.IGNORECASE | re.ASCII
)
_HUMAN_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")


def thin_id(value: int) -> ThinId:
    """Check a thin id where it enters: 0 to 2**24-1, else `UsageError`."""
    if not 0 <= value <= MAX_THIN_ID:
        raise UsageError(f"thin id {value} is not between 0 and {MAX_THIN_ID}")
    return ThinId(value)


def data_block_size(value: int) -> Bytes:
    """Check the size of a data block in bytes: 64 KiB to 1 GiB in multiples of 64 KiB."""
    if not MIN_DATA_BLOCK_SIZE <= value <= MAX_DATA_BLOCK_SIZE or value % MIN_DATA_BLOCK_SIZE:
        raise UsageError(
            f"block size {value} is not a multiple of {MIN_DATA_BLOCK_SIZE} bytes"
            f" between {MIN_DATA_BLOCK_SIZE} and {MAX_DATA_BLOCK_SIZE}",
            hint="use for example dm.blocksize=64K or dm.blocksize=512K",
        )
    return Bytes(value)


def sectors(value: Bytes) -> Sectors:
    """The whole sectors in *value* bytes."""
    return Sectors(value // SECTOR_SIZE)


def parse_size(text: str) -> Bytes:
    """Read a size as Docker's `units.RAMInBytes` does: 64K, 10g, 1.5 GiB.

    A number, maybe a blank, maybe one of kmgtp with an optional i, an optional b: powers of 1024
    in any spelling.  What is left of a fraction is cut off at whole bytes.  Decimals, the blank and
    the i came to Docker after 1.7.  Docker lets large values overflow; we refuse what does not fit
    a signed 64-bit integer.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"size {text!r} is not a number with an optional unit such as 10G or 64K")
    whole, fraction, unit = match.groups(default="")
    factor = 1024 ** " kmgtp".index(unit.lower() or " ")
    value = int(whole + fraction) * factor // 10 ** len(fraction)
    if value >= 2**63:
        raise UsageError(f"size {text!r} is larger than any device can be")
    return Bytes(value)


def human_size(value: float) -> str:
    """Spell a size as `docker info` of 1.7 does: base 1000, four significant digits, a blank."""
    unit = 0
    while value >= 1000 and unit < len(_HUMAN_UNITS) - 1:
        value /= 1000
        unit += 1
    return f"{value:.4g} {_HUMAN_UNITS[unit]}"
