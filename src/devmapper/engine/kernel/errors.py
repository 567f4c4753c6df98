"""What the kernel's errnos mean for a pool: the one table.

What each is for was tried on Linux 6.1 (`tests/kernel/test_kernel_modes.py`); what is not in the
table stays the `OSError` that it is, with the message to the pool as a note.
"""

import errno
from collections.abc import Callable
from typing import Final

from devmapper.engine.port import PoolMode, PoolStatus
from devmapper.errors import (
    DevmapperError,
    EngineError,
    PoolFull,
    PoolNotFound,
    PoolUnusable,
    Space,
    ThinIdExists,
    ThinIdMissing,
)
from devmapper.units import ThinId

# What a pool answers that is read-only, has failed or is out of metadata
_REFUSALS: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.EROFS, errno.EPERM})
_REFUSING: Final = (PoolMode.READ_ONLY, PoolMode.FAIL)
_NO_POOL: Final = frozenset({errno.ENXIO, errno.ENODEV, errno.ENOENT})


def translate(
    err: OSError, pool: str, status: Callable[[], PoolStatus], thin_id: ThinId | None = None
) -> DevmapperError | OSError:
    """The error to raise for what device mapper answered about *thin_id* in *pool*.

    *status* is asked only where the errno alone does not say enough.
    """
    if thin_id is not None and err.errno == errno.EEXIST:
        return ThinIdExists(thin_id)
    if thin_id is not None and err.errno == errno.ENODATA:
        return ThinIdMissing(thin_id)
    if err.errno in _NO_POOL:
        return not_active(pool)
    if err.errno == errno.ENOSPC:
        return _full(status())
    if err.errno in _REFUSALS and (now := status()).mode in _REFUSING:
        return unusable(now)
    return err


def not_active(pool: str) -> PoolNotFound:
    return PoolNotFound(
        f"pool {pool!r} is not active", hint="the next command that needs the pool activates it"
    )


def stays_suspended(what: str, name: str, err: OSError) -> EngineError:
    """The loudest error there is: *what* (device, pool) *name* could not be resumed."""
    return EngineError(
        f"{what} {name!r} stays suspended, it could not be resumed: {err.strerror}",
        hint=f"dmsetup resume {name}",
    )


def unusable(status: PoolStatus) -> PoolUnusable | PoolFull:
    """Why a pool in the mode that *status* says cannot do what was asked."""
    if _is_out_of_metadata(status):
        return _full(status)
    return PoolUnusable(status.mode, "its metadata need a check" if status.needs_check else "")


def _full(status: PoolStatus) -> PoolFull:
    free = status.total_metadata_blocks - status.used_metadata_blocks
    return PoolFull(Space.METADATA, free=free)


def _is_out_of_metadata(status: PoolStatus) -> bool:
    """The kernel's mode PM_OUT_OF_METADATA_SPACE, which its status calls `ro`."""
    full = status.used_metadata_blocks >= status.total_metadata_blocks > 0
    return status.mode is PoolMode.READ_ONLY and full and not status.needs_check
