"""Lines of the targets `thin-pool` and `thin`: tables both ways, status one way.

The forms are those of the kernel's `Documentation/admin-guide/device-mapper/thin-provisioning.rst`
and `drivers/md/dm-thin.c`.  Pure: no I/O.
"""

import errno
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.engine.port import PoolMode, PoolStatus, PoolTable
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.libdm import Target
from devmapper.units import SECTOR_SIZE, Bytes, Sectors, ThinId, TransactionId, sectors

POOL: Final = "thin-pool"
THIN: Final = "thin"

_FEATURES: Final = (
    ("skip_block_zeroing", "skip_block_zeroing"),
    ("ignore_discard", "ignore_discard"),
    ("no_discard_passdown", "no_discard_passdown"),
    ("read_only", "read_only"),
    ("error_if_no_space", "error_if_no_space"),
)  # word of the table, field of PoolTable
_MODES: Final = {
    "rw": PoolMode.WRITE,
    "ro": PoolMode.READ_ONLY,
    "out_of_data_space": PoolMode.OUT_OF_DATA_SPACE,
}


class PoolLine(NamedTuple):
    """A pool's table as the kernel has it: devices by number."""

    metadata_device: DeviceNumber
    data_device: DeviceNumber
    table: PoolTable  # whose paths are the numbers' spelling


class ThinLine(NamedTuple):
    """A thin device's table."""

    pool: DeviceNumber
    thin_id: ThinId
    size: Bytes


def pool_target(table: PoolTable) -> Target:
    """The line that makes a pool; moby's (`devmapper.go` CreatePool) for a table of defaults."""
    features = [word for word, field in _FEATURES if getattr(table, field)]
    params = [
        str(table.metadata_device),
        str(table.data_device),
        str(sectors(table.block_size)),
        str(table.low_water_mark),
        str(len(features)),
        *features,
    ]
    return Target(Sectors(0), sectors(table.data_size), POOL, " ".join(params))


def parse_pool_table(target: Target) -> PoolLine:
    """Read a pool's line back; EINVAL if it is none that this kernel interface has."""
    words = target.params.split()
    try:
        metadata, data = _number(words[0]), _number(words[1])
        block_size = Bytes(int(words[2]) * SECTOR_SIZE)
        low_water_mark = int(words[3])
        features = frozenset(words[5:])
    except (IndexError, ValueError) as err:
        raise _strange(target, "table") from err
    table = PoolTable(
        Path(words[0]),
        Path(words[1]),
        Bytes(target.length * SECTOR_SIZE),
        block_size,
        low_water_mark,
        **{field: word in features for word, field in _FEATURES},
    )
    return PoolLine(metadata, data, table)


def thin_target(pool: Path, thin_id: ThinId, size: Bytes) -> Target:
    return Target(Sectors(0), sectors(size), THIN, f"{pool} {thin_id}")


def parse_thin_table(target: Target) -> ThinLine:
    words = target.params.split()
    try:
        return ThinLine(
            _number(words[0]), ThinId(int(words[1])), Bytes(target.length * SECTOR_SIZE)
        )
    except (IndexError, ValueError) as err:
        raise _strange(target, "table") from err


def parse_pool_status(target: Target, table: PoolTable) -> PoolStatus:
    """Read a pool's status; one that failed tells nothing but that (numbers are 0)."""
    words = target.params.split()
    if words[:1] in (["Fail"], ["Error"]):
        return _failed(table)
    try:
        used_metadata, total_metadata = map(int, words[1].split("/"))
        used_data, total_data = map(int, words[2].split("/"))
        held = None if words[3] == "-" else int(words[3])
        mode = _MODES[words[4]]
        flags = frozenset(words[5:])
        transaction_id = TransactionId(int(words[0]))
    except (IndexError, KeyError, ValueError) as err:
        raise _strange(target, "status") from err
    return PoolStatus(
        transaction_id=transaction_id,
        used_metadata_blocks=used_metadata,
        total_metadata_blocks=total_metadata,
        used_data_blocks=used_data,
        total_data_blocks=total_data,
        block_size=table.block_size,
        held_metadata_root=held,
        mode=mode,
        needs_check="needs_check" in flags,
        error_if_no_space="error_if_no_space" in flags,
        discard_passdown="discard_passdown" in flags,
        low_water_reached=total_data - used_data <= table.low_water_mark,
    )


def _failed(table: PoolTable) -> PoolStatus:
    return PoolStatus(
        transaction_id=TransactionId(0),
        used_metadata_blocks=0,
        total_metadata_blocks=0,
        used_data_blocks=0,
        total_data_blocks=0,
        block_size=table.block_size,
        held_metadata_root=None,
        mode=PoolMode.FAIL,
        needs_check=False,
        error_if_no_space=table.error_if_no_space,
        discard_passdown=False,
        low_water_reached=False,
    )


def _number(word: str) -> DeviceNumber:
    major, separator, minor = word.partition(":")
    if not separator:
        raise ValueError(word)
    return DeviceNumber(int(major), int(minor))


def _strange(target: Target, what: str) -> OSError:
    return OSError(errno.EINVAL, f"{what} of a {target.kind} cannot be read: {target.params!r}")
