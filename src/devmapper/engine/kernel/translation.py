"""What an errno of device mapper means: the one place where `OSError` becomes our own errors.

The numbers were seen on Linux 6.1 and are those of `drivers/md/dm-thin.c` and `dm-ioctl.c`.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from devmapper.engine.port import PoolMode, PoolStatus
from devmapper.errors import (
    EngineError,
    PoolFull,
    PoolUnusable,
    Space,
    ThinBusy,
    ThinIdExists,
    ThinIdMissing,
    TransactionConflict,
)
from devmapper.linux.holders import holders
from devmapper.units import ThinId, TransactionId

Ask = Callable[[], PoolStatus]

_READ_ONLY: Final = frozenset({PoolMode.READ_ONLY, PoolMode.FAIL})


@contextmanager
def of_messages(
    ask: Ask,
    *,
    new: ThinId | None = None,
    existing: ThinId | None = None,
    name: str = "",
) -> Iterator[None]:
    """Errors of a message about thin ids: *new* is to be made, *existing* has to be there."""
    try:
        yield
    except OSError as err:
        match err.errno:
            case errno.EEXIST if new is not None:
                raise ThinIdExists(new) from err
            case errno.ENODATA if existing is not None:
                raise ThinIdMissing(existing) from err
            case errno.EBUSY:
                raise ThinBusy(name or f"thin id {existing}", ("its activation",)) from err
            case errno.ENOSPC:
                status = ask()
                free = status.total_metadata_blocks - status.used_metadata_blocks
                raise PoolFull(Space.METADATA, free=free) from err
            case errno.EOPNOTSUPP | errno.EINVAL | errno.EIO | errno.EROFS:
                check_usable(ask(), cause=err)
            case _:
                pass
        raise


@contextmanager
def of_transaction_id(ask: Ask, expected: TransactionId) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EIO):
            status = ask()
            check_usable(status, cause=err)
            if status.transaction_id != expected:
                raise TransactionConflict(status.transaction_id, expected) from err
        raise


@contextmanager
def of_activation(ask: Ask, thin_id: ThinId) -> Iterator[None]:
    """Errors of making a thin device's block device."""
    try:
        yield
    except OSError as err:
        if err.errno == errno.ENODATA:
            raise ThinIdMissing(thin_id) from err
        if err.errno in (errno.EINVAL, errno.EIO):
            check_usable(ask(), cause=err, writing=False)
        raise _of_udev(err) from err


@contextmanager
def of_removal(name: str, node: Path) -> Iterator[None]:
    """Errors of removing a device; one that is gone already is no error."""
    try:
        yield
    except OSError as err:
        if err.errno == errno.EBUSY:
            raise ThinBusy(name, _holders(node)) from err
        if err.errno != errno.ENXIO:
            raise _of_udev(err) from err


@contextmanager
def of_suspension(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno == errno.EBUSY:
            raise EngineError(
                f"file system on device {name!r} is frozen by somebody else",
                hint="thaw it with fsfreeze --unfreeze and its mount point",
            ) from err
        raise


def check_usable(status: PoolStatus, *, cause: OSError | None = None, writing: bool = True) -> None:
    """`PoolUnusable` if the pool's mode forbids what was asked for."""
    if status.mode is PoolMode.FAIL or (writing and status.mode in _READ_ONLY):
        reason = "needs_check" if status.needs_check else (cause.strerror if cause else "")
        raise PoolUnusable(status.mode, reason or "") from cause


def of_udev(err: OSError) -> Exception:
    """A wait for udev that was given up, in words; another error as it is."""
    return _of_udev(err)


def _of_udev(err: OSError) -> Exception:
    if err.errno != errno.ETIMEDOUT:
        return err
    return EngineError(
        f"device {err.filename!r}: {err.strerror}",
        hint="look after udevd and the rules of the package dmsetup; DM_DISABLE_UDEV=1 does"
        " without",
    )


def _holders(node: Path) -> list[str]:
    try:
        return holders(node)
    except OSError:
        return []
