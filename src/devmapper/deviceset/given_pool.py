"""A pool of the kernel's device mapper that its administrator made: `dm.thinpooldev`.

It is taken over only if it is empty or this graph's own, and it is never made, resized or
deactivated here.  moby looks at the data blocks and the transaction id only (deviceset.go
checkThinPool).
"""

from typing import TYPE_CHECKING, Final

from devmapper.deviceset.names import BASE
from devmapper.deviceset.records import RecordStore
from devmapper.engine.port import Engine, ThinPool
from devmapper.errors import EnvironmentLacking, PoolMismatch, PoolNotFound, ToolError
from devmapper.linux import disks

if TYPE_CHECKING:
    from collections.abc import Callable

_LVM_PREFIX: Final = "LVM-"
_UNUSED: Final = "nothing was changed"


def find_given_pool(engine: Engine, name: str, store: RecordStore) -> ThinPool:
    """The active pool *name*, which this graph may use.

    `PoolNotFound` if it is not active; `PoolMismatch` if it is no thin pool, if it holds something
    that is not this graph's, or if LVM has had thin volumes of its own in it.
    """
    uuid = disks.dm_uuid(name)
    if uuid is None:
        raise PoolNotFound(
            f"thin pool '/dev/mapper/{name}' is not active",
            hint=f"activate it first (of LVM's: lvchange -ay {_volume(name)}); it is never made"
            " here",
        )
    begun = has_begun(store)
    if not begun and uuid.startswith(_LVM_PREFIX):
        _check_lvm(name)
    pool = engine.find_pool(name)
    if pool is None:
        raise PoolNotFound(f"thin pool '/dev/mapper/{name}' has just been deactivated")
    if not begun:
        check_empty(pool)
    return pool


def has_begun(store: RecordStore) -> bool:
    """Whether the graph has ever worked on a pool: a base layer, or the intent to make one."""
    return store.load(BASE) is not None or store.load_transaction() is not None


def check_empty(pool: ThinPool) -> None:
    """`PoolMismatch` unless nobody has used *pool* yet.

    The numbers of the status come first: asking for thin ids is a message to the pool.
    """
    status = pool.status()
    reasons: tuple[tuple[Callable[[], int], str], ...] = (
        (lambda: status.used_data_blocks, "data blocks in use"),
        (lambda: status.transaction_id, "as its transaction id, expected 0"),
        (lambda: len(pool.thin_ids()), "thin devices"),
    )
    for count, what in reasons:
        if found := count():
            raise PoolMismatch(
                f"pool {pool.name!r} is not this graph's, and it is not empty: it has {found}"
                f" {what}",
                hint=f"name an empty pool, or the home of the graph that the pool belongs to;"
                f" {_UNUSED}",
            )


def _check_lvm(name: str) -> None:
    """LVM checks the transaction id of a pool in which it ever made a volume, and we move it.

    From then on it would refuse to activate the pool (LVM: libdm/libdm-deptree.c).
    """
    from devmapper.linux import lvm  # a pool is taken over once, and opened often

    volume = lvm.volume_of(name)
    if volume is None:
        return
    try:
        found = lvm.transaction_id(*volume)
    except EnvironmentLacking:
        return  # without lvm2 nobody can have made a volume here; the pool itself is looked at next
    except ToolError as err:
        raise PoolMismatch(
            f"LVM does not know the pool {_volume(name)!r}: {err}", hint=_UNUSED
        ) from err
    if found:
        raise PoolMismatch(
            f"pool {_volume(name)!r} has held thin volumes of LVM (LVM's transaction id is {found},"
            " expected 0)",
            hint="LVM would refuse to activate it after our first layer; make a pool in which no"
            " thin volume was ever created",
        )


def _volume(name: str) -> str:
    from devmapper.linux import lvm

    volume = lvm.volume_of(name)
    return "/".join(volume) if volume else name
