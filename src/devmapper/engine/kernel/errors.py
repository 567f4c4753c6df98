"""What the kernel's errnos mean for a pool: the one table.

What each is for was tried on Linux 6.1 (`tests/kernel/test_kernel_errors.py`); what is not in the
table stays the `OSError` that it is, with the message to the pool as a note.
"""

import errno
from collections.abc import Callable
from typing import Final

from devmapper.engine.port import PoolMode, PoolStatus
from devmapper.errors import (
    DevmapperError,
    PoolFull,
    PoolNotFound,
    PoolUnusable,
    Space,
    ThinIdExists,
    ThinIdMissing,
)
from devmapper.units import ThinId

# What a pool answers that is read-only or has failed
_REFUSALS: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.EROFS, errno.EPERM})
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
        now = status()
        return PoolFull(Space.METADATA, free=now.total_metadata_blocks - now.used_metadata_blocks)
    if err.errno in _REFUSALS:
        now = status()
        if now.mode is not PoolMode.WRITE:
            return unusable(now)
    return err


def not_active(pool: str) -> PoolNotFound:
    return PoolNotFound(
        f"pool {pool!r} is not active", hint="the next command that needs the pool activates it"
    )


def unusable(status: PoolStatus) -> PoolUnusable:
    """Why a pool in the mode that *status* says cannot do what was asked."""
    return PoolUnusable(status.mode, "its metadata need a check" if status.needs_check else "")
