"""System V semaphores (semop(2), semctl(2)), as far as udev's cookies are such."""

import ctypes
import errno
import os
import time
from struct import Struct
from typing import Final

_IPC_NOWAIT: Final = 0o4000
_IPC_RMID: Final = 0
_GETVAL: Final = 12
_SEMBUF: Final = Struct("@Hhh")  # struct sembuf: sem_num sem_op sem_flg

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.semget.argtypes = [ctypes.c_int] * 3
_libc.semctl.argtypes = [ctypes.c_int] * 3
_libc.semtimedop.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]
_TIMESPEC: Final = Struct("@ll")


def find(key: int) -> int:
    """The semaphore set with *key*; ENOENT if there is none."""
    return _checked(_libc.semget(ctypes.c_int32(key).value, 1, 0), "semget")


def value(semaphore: int) -> int:
    return _checked(_libc.semctl(semaphore, 0, _GETVAL), "semctl")


def decrement(semaphore: int) -> None:
    """Take one away; EAGAIN if it is 0."""
    _operate(semaphore, -1, _IPC_NOWAIT, 0.0)


def wait_for_zero(semaphore: int, timeout: float) -> bool:
    """Whether it became 0 within *timeout* seconds.  EIDRM if somebody removes it meanwhile."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            _operate(semaphore, 0, 0, max(deadline - time.monotonic(), 0.0))
        except InterruptedError:
            continue  # a signal whose handler had nothing to object
        except BlockingIOError:
            return False
        else:
            return True


def remove(semaphore: int) -> None:
    """Destroy it; whoever waits for it gets EIDRM.  EINVAL or EIDRM if it is gone already."""
    _checked(_libc.semctl(semaphore, 0, _IPC_RMID), "semctl")


def is_gone(error: OSError) -> bool:
    """Whether *error* says that the semaphore does not exist any more."""
    return error.errno in (errno.EIDRM, errno.EINVAL, errno.ENOENT)


def _operate(semaphore: int, operation: int, flags: int, timeout: float) -> None:
    seconds = int(timeout)
    limit = _TIMESPEC.pack(seconds, int((timeout - seconds) * 1e9))
    request = _SEMBUF.pack(0, operation, flags)
    _checked(_libc.semtimedop(semaphore, request, 1, limit), "semtimedop")


def _checked(result: int, call: str) -> int:
    if result >= 0:
        return result
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")
