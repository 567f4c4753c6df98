"""How much of a pool has to stay free when a layer is made (dm.min_free_space)."""

from devmapper.engine.port import PoolStatus
from devmapper.errors import PoolFull, Space
from devmapper.units import Bytes


def minimum_free_space(status: PoolStatus, percent: int) -> Bytes:
    """The bytes of data that *percent* stands for, as moby's `Thin Pool Minimum Free Space`."""
    return Bytes(status.total_data_blocks * status.block_size * percent // 100)


def check_free_space(status: PoolStatus, percent: int) -> None:
    """`PoolFull` if less than *percent* of data blocks or of metadata blocks is free.

    As moby deviceset.go poolHasFreeSpace: at least one block of each; 0 percent switches it off.
    A pool that runs full under running containers does more harm than a layer that is not made.
    """
    if percent == 0:
        return
    _check(Space.DATA, status.used_data_blocks, status.total_data_blocks, percent)
    _check(Space.METADATA, status.used_metadata_blocks, status.total_metadata_blocks, percent)


def _check(kind: Space, used: int, total: int, percent: int) -> None:
    free = total - used
    minimum = max(1, total * percent // 100)
    if free < minimum:
        raise PoolFull(
            kind,
            free=free,
            needed=minimum,
            hint=f"dm.min_free_space={percent}% keeps that much free: remove layers, enlarge the"
            " pool with devmapper pool resize, or give a smaller percentage (0% for none)",
        )
