"""Where two thin devices differ, as the port tells it, from metadata that an engine keeps still."""

from typing import Final

from devmapper.engine.port import ChangedRange
from devmapper.thin.delta import bounded_ranges
from devmapper.thin.format import Superblock
from devmapper.thin.walk import BlockReader
from devmapper.units import Bytes, ThinId

MOST_RANGES: Final = 1 << 16


def changed_ranges(
    device: BlockReader, superblock: Superblock, thin_a: ThinId, thin_b: ThinId
) -> list[ChangedRange]:
    """The answer of `ThinPool.changed_ranges` below *superblock*, whose trees nobody reuses."""
    size = superblock.block_size
    return [
        ChangedRange(Bytes(each.begin * size), Bytes(each.length * size))
        for each in bounded_ranges(device, superblock, thin_a, thin_b, limit=MOST_RANGES)
    ]
