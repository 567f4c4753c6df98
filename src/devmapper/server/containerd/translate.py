"""The one place where an error becomes a gRPC status.

containerd makes its own errors of the codes (`errdefs/grpc.go`): its garbage collector goes on
after FAILED_PRECONDITION, and an image is unpacked by one of two clients that get ALREADY_EXISTS.
"""

import errno
import logging
from typing import Final, NamedTuple

from grpc import StatusCode

from devmapper import errors

log = logging.getLogger(__name__)

# The first that fits
_CODES: Final[tuple[tuple[type[errors.DevmapperError], StatusCode], ...]] = (
    (errors.UsageError, StatusCode.INVALID_ARGUMENT),
    (errors.LayerNotFound, StatusCode.NOT_FOUND),
    (errors.LayerExists, StatusCode.ALREADY_EXISTS),
    (errors.SnapshotStateError, StatusCode.FAILED_PRECONDITION),
    (errors.LayerBusy, StatusCode.FAILED_PRECONDITION),
    (errors.LayerNotMounted, StatusCode.FAILED_PRECONDITION),
    (errors.ThinBusy, StatusCode.FAILED_PRECONDITION),
    (errors.PoolBusy, StatusCode.FAILED_PRECONDITION),
    (errors.DeviceBusy, StatusCode.FAILED_PRECONDITION),
    (errors.PoolNotFound, StatusCode.FAILED_PRECONDITION),
    (errors.PoolMismatch, StatusCode.FAILED_PRECONDITION),
    (errors.EnvironmentLacking, StatusCode.FAILED_PRECONDITION),
    (errors.PoolFull, StatusCode.RESOURCE_EXHAUSTED),
    (errors.ThinIdsExhausted, StatusCode.RESOURCE_EXHAUSTED),
    (errors.PoolUnusable, StatusCode.UNAVAILABLE),
    (errors.GraphLocked, StatusCode.UNAVAILABLE),
    (errors.EngineError, StatusCode.UNAVAILABLE),
    (errors.TransactionConflict, StatusCode.DATA_LOSS),
    (errors.IntegrityError, StatusCode.DATA_LOSS),
)
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_LIMIT: Final = 2000  # bytes: a status travels in a header, percent-encoded, of 8 KiB at most


class Status(NamedTuple):
    code: StatusCode
    text: str


def translate(error: BaseException, operation: str) -> Status:
    """What the client is told; an error that nobody expects is logged with its traceback."""
    code = _code(error)
    if code is StatusCode.INTERNAL:
        log.error("%s failed", operation, exc_info=error)
        if not isinstance(error, errors.DevmapperError | OSError):
            return Status(code, _fitting(f"internal error: {type(error).__name__}: {error}"))
    elif code is StatusCode.DATA_LOSS:
        log.error("%s: %s", operation, error)
    return Status(code, _fitting(_text(error)))


def _code(error: BaseException) -> StatusCode:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return StatusCode.RESOURCE_EXHAUSTED
    return StatusCode.INTERNAL


def _text(error: BaseException) -> str:
    """What failed, what was done about it meanwhile (its notes), and what to do."""
    hint = error.hint if isinstance(error, errors.DevmapperError) else ""
    return "; ".join([str(error), *getattr(error, "__notes__", ()), *([hint] if hint else ())])


def _fitting(text: str) -> str:
    """The same in one line that a header can carry."""
    text = " ".join(text.split())
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) > _LIMIT:
        raw = raw[: _LIMIT - 3] + b"..."
    return raw.decode("utf-8", "ignore")
