"""Waiting until udev is through with an event of device mapper: the "cookie" of libdevmapper.

A cookie is a System V semaphore of value 1.  Each task that carries it adds 1, each event whose
rules have run takes 1 away.  libdevmapper's own wait has no end: where udev was restarted, or its
rules are missing, callers hang for ever and semaphores leak.  Here both are bounded: the wait by
time, the semaphore's life by the context.
"""

import ctypes
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from devmapper.linux import libdm

WAIT_SECONDS: Final = 20.0

_IPC_NOWAIT: Final = 0o4000  # bits/ipc.h
_IPC_RMID: Final = 0
_GONE: Final = frozenset({errno.EIDRM, errno.EINVAL})


class _Operation(ctypes.Structure):
    # struct sembuf
    _fields_ = (("number", ctypes.c_ushort), ("change", ctypes.c_short), ("flags", ctypes.c_short))


class _Time(ctypes.Structure):
    # struct timespec
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.semget.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
_libc.semctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
_libc.semtimedop.argtypes = [
    ctypes.c_int,
    ctypes.POINTER(_Operation),
    ctypes.c_size_t,
    ctypes.POINTER(_Time),
]


@contextmanager
def cookie(subject: str, *, timeout: float = WAIT_SECONDS) -> Iterator[int]:
    """A cookie for the tasks of the block; leaving waits until udev is through with them.

    0 where udev does not run, and then there is nothing to wait for.  ETIMEDOUT if udev has not
    answered after *timeout* seconds: what the tasks did stands.  The semaphore is gone on
    every path afterwards.  Hold no lock that others wait for.
    """
    key = libdm.create_cookie()
    if not key:
        yield 0
        return
    semaphore = _libc.semget(ctypes.c_int(key).value, 1, 0)
    if semaphore < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"semaphore of a udev cookie: {os.strerror(number)}", subject)
    with destroyed_afterwards(semaphore):
        yield key
        wait(semaphore, subject, timeout)


@contextmanager
def destroyed_afterwards(semaphore: int) -> Iterator[None]:
    try:
        yield
    finally:
        _libc.semctl(semaphore, 0, _IPC_RMID)  # gone already: udevcomplete_all of an admin


def wait(semaphore: int, subject: str, timeout: float) -> None:
    """Give up our own share and wait for 0; a semaphore that goes away has been completed."""
    _operate(semaphore, _Operation(0, -1, _IPC_NOWAIT), None)
    deadline = time.monotonic() + timeout
    while True:
        left = max(0.0, deadline - time.monotonic())
        number = _operate(semaphore, _Operation(0, 0, 0), left)
        if number == 0 or number in _GONE:
            return
        if number == errno.EINTR:
            continue
        if number == errno.EAGAIN:
            message = f"udev has not answered within {timeout:g} seconds"
            raise OSError(errno.ETIMEDOUT, message, subject)
        raise OSError(number, f"waiting for udev: {os.strerror(number)}", subject)


def _operate(semaphore: int, operation: _Operation, seconds: float | None) -> int:
    """The errno of semtimedop(2), 0 if it succeeded."""
    limit = None
    if seconds is not None:
        limit = ctypes.byref(_Time(int(seconds), int(seconds % 1 * 1e9)))
    if _libc.semtimedop(semaphore, ctypes.byref(operation), 1, limit) == 0:
        return 0
    return ctypes.get_errno()
