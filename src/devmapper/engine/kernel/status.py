"""Status lines of thin-pool and thin targets, as typed values.  Pure: text in, values out.

`dm-thin.c` pool_status and thin_status, documented in admin-guide/device-mapper/thin-provisioning:

    <transaction id> <used>/<total metadata blocks> <used>/<total data blocks>
    <held root>|- rw|ro|out_of_data_space [no_]discard_passdown|ignore_discard
    error_if_no_space|queue_if_no_space needs_check|- <metadata low water mark>

Kernels before 3.10 end after the held root, before 4.19 after needs_check.  Where the metadata
cannot be asked the line is `Fail` or `Error`.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from devmapper.engine.port import PoolMode
from devmapper.units import TransactionId

_GONE: Final = ("Fail", "Error")
_NONE: Final = "-"


class PoolLine(NamedTuple):
    """A pool's status line; everything is 0 or false where *mode* is FAIL."""

    transaction_id: TransactionId
    used_metadata_blocks: int
    total_metadata_blocks: int
    used_data_blocks: int
    total_data_blocks: int
    held_metadata_root: int | None
    mode: PoolMode
    needs_check: bool
    error_if_no_space: bool
    discard_passdown: bool
    ignore_discard: bool
    metadata_low_water: int | None  # in metadata blocks; None where the kernel does not tell


class ThinLine(NamedTuple):
    """A thin device's status line, in sectors; None where it says `Fail`."""

    mapped_sectors: int
    highest_mapped_sector: int | None


_FAILED: Final = PoolLine(
    TransactionId(0),
    *(0, 0, 0, 0),
    held_metadata_root=None,
    mode=PoolMode.FAIL,
    needs_check=False,
    error_if_no_space=False,
    discard_passdown=False,
    ignore_discard=False,
    metadata_low_water=None,
)


def parse_pool(line: str) -> PoolLine:
    """A pool's status; `ValueError` if *line* is none."""
    words = line.split()
    if words and words[0] in _GONE:
        return _FAILED
    if len(words) < 4:
        raise ValueError(f"status of a pool has {len(words)} words, expected at least 4: {line!r}")
    used_metadata, total_metadata = _pair(words[1])
    used_data, total_data = _pair(words[2])
    flags = words[4:]
    return PoolLine(
        TransactionId(int(words[0])),
        used_metadata,
        total_metadata,
        used_data,
        total_data,
        held_metadata_root=None if words[3] == _NONE else int(words[3]),
        mode=_mode(flags),
        needs_check="needs_check" in flags,
        error_if_no_space="error_if_no_space" in flags,
        discard_passdown="discard_passdown" in flags,
        ignore_discard="ignore_discard" in flags,
        metadata_low_water=int(flags[4]) if len(flags) > 4 and flags[4].isdigit() else None,
    )


def parse_thin(line: str) -> ThinLine | None:
    """A thin device's status; `ValueError` if *line* is none."""
    words = line.split()
    if not words or words[0] in _GONE or words[0] == _NONE:
        return None
    if len(words) != 2:
        raise ValueError(f"status of a thin device has {len(words)} words, expected 2: {line!r}")
    return ThinLine(int(words[0]), None if words[1] == _NONE else int(words[1]))


def _mode(flags: Sequence[str]) -> PoolMode:
    for mode in (PoolMode.WRITE, PoolMode.OUT_OF_DATA_SPACE, PoolMode.READ_ONLY):
        if mode in flags:
            return mode
    if flags:
        raise ValueError(f"status of a pool has the mode {flags[0]!r}")
    return PoolMode.WRITE  # a kernel that does not tell has no other


def _pair(word: str) -> tuple[int, int]:
    used, _, total = word.partition("/")
    return int(used), int(total)
