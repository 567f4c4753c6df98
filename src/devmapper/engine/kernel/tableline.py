"""Table lines of thin-pool and thin targets, in both directions.  Pure: no device is looked at.

    0 <sectors> thin-pool <metadata> <data> <block sectors> <low water mark> <n> <feature>…
    0 <sectors> thin <pool> <thin id>

as moby's devmapper.go writes them; the kernel gives devices back as `major:minor`.
"""

from pathlib import Path
from typing import Final, NamedTuple

from devmapper.engine.port import PoolTable
from devmapper.linux import dmnode
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.libdm import Target
from devmapper.units import SECTOR_SIZE, Bytes, Sectors, ThinId, sectors

POOL: Final = "thin-pool"
THIN: Final = "thin"
# In the kernel's own order (`dm-thin.c: emit_flags`)
_FEATURES: Final = (
    ("skip_block_zeroing", "skip_block_zeroing"),
    ("ignore_discard", "ignore_discard"),
    ("no_discard_passdown", "no_discard_passdown"),
    ("read_only", "read_only"),
    ("error_if_no_space", "error_if_no_space"),
)


class PoolLine(NamedTuple):
    """An active pool's table, its devices by number."""

    metadata_device: DeviceNumber
    data_device: DeviceNumber
    length: Sectors
    block_sectors: Sectors
    low_water_mark: int
    features: frozenset[str]

    def table(self, metadata_device: Path, data_device: Path) -> PoolTable:
        """The port's table, with the devices' paths."""
        return PoolTable(
            metadata_device,
            data_device,
            Bytes(self.length * SECTOR_SIZE),
            self.block_size,
            self.low_water_mark,
            **{field: feature in self.features for field, feature in _FEATURES},
        )

    @property
    def block_size(self) -> Bytes:
        return Bytes(self.block_sectors * SECTOR_SIZE)


class ThinLine(NamedTuple):
    """An active thin device's table."""

    pool: DeviceNumber
    thin_id: ThinId
    length: Sectors

    @property
    def size(self) -> Bytes:
        return Bytes(self.length * SECTOR_SIZE)


def pool_target(table: PoolTable) -> Target:
    """The line to load for a pool."""
    features = [feature for field, feature in _FEATURES if getattr(table, field)]
    words = (
        str(table.metadata_device),
        str(table.data_device),
        str(sectors(table.block_size)),
        str(table.low_water_mark),
        str(len(features)),
        *features,
    )
    return Target(Sectors(0), sectors(table.data_size), POOL, " ".join(words))


def thin_target(pool: str, thin_id: ThinId, size: Bytes) -> Target:
    """The line to load for a thin device."""
    return Target(Sectors(0), sectors(size), THIN, f"{dmnode.path_of(pool)} {thin_id}")


def parse_pool(target: Target) -> PoolLine:
    """The line of an active pool; `ValueError` if it is none."""
    words = target.params.split()
    if target.kind != POOL or len(words) < 4:
        raise ValueError(f"no table of a pool: {target.kind} {target.params}")
    return PoolLine(
        _number(words[0]),
        _number(words[1]),
        target.length,
        Sectors(int(words[2])),
        int(words[3]),
        frozenset(words[5:]),
    )


def parse_thin(target: Target) -> ThinLine:
    """The line of an active thin device; `ValueError` if it is none."""
    words = target.params.split()
    if target.kind != THIN or len(words) < 2:
        raise ValueError(f"no table of a thin device: {target.kind} {target.params}")
    return ThinLine(_number(words[0]), ThinId(int(words[1])), target.length)


def _number(word: str) -> DeviceNumber:
    major, separator, minor = word.partition(":")
    if not separator:
        raise ValueError(f"no device number: {word!r}")
    return DeviceNumber(int(major), int(minor))
