"""What the kernel's errnos mean, and waiting for udev; no device mapper is needed."""

import ctypes
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest

from devmapper.engine.kernel import errors
from devmapper.engine.kernel.locks import PoolLocks, check_plain
from devmapper.engine.port import PoolMode, PoolStatus
from devmapper.errors import (
    EngineError,
    PoolFull,
    PoolNotFound,
    PoolUnusable,
    ThinIdExists,
    ThinIdMissing,
    UsageError,
)
from devmapper.linux import libdm, semaphore, udev_cookie
from devmapper.units import KIB, Bytes, ThinId, TransactionId
from tests.support import capabilities

IPC_CREAT, IPC_EXCL, SETVAL = 0o1000, 0o2000, 16


def status(mode: PoolMode, *, used: int = 10, needs_check: bool = False) -> PoolStatus:
    return PoolStatus(
        TransactionId(0),
        used,
        100,
        0,
        100,
        Bytes(64 * KIB),
        None,
        mode,
        needs_check=needs_check,
        error_if_no_space=False,
        discard_passdown=True,
        low_water_reached=False,
    )


def translated(number: int, mode: PoolMode = PoolMode.WRITE, **given: object) -> Exception:
    err = OSError(number, os.strerror(number))
    return errors.translate(err, "pool", lambda: status(mode, **given), ThinId(7))  # type: ignore[arg-type]


def test_every_errno_of_the_table():
    assert type(translated(errno.EEXIST)) is ThinIdExists
    assert type(translated(errno.ENODATA)) is ThinIdMissing
    assert type(translated(errno.ENOSPC)) is PoolFull
    for number in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
        assert type(translated(number)) is PoolNotFound
    for number in (errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.EROFS, errno.EPERM):
        for mode in (PoolMode.READ_ONLY, PoolMode.FAIL):
            assert type(translated(number, mode)) is PoolUnusable
        for mode in (PoolMode.WRITE, PoolMode.OUT_OF_DATA_SPACE):
            assert isinstance(translated(number, mode), OSError)
    assert isinstance(translated(errno.ENOMEM, PoolMode.FAIL), OSError)


def test_out_of_metadata_looks_read_only():
    full = translated(errno.EOPNOTSUPP, PoolMode.READ_ONLY, used=100)
    assert isinstance(full, PoolFull)
    assert full.free == 0
    check = translated(errno.EOPNOTSUPP, PoolMode.READ_ONLY, used=100, needs_check=True)
    assert isinstance(check, PoolUnusable)
    assert "need a check" in str(check)


@pytest.fixture
def key() -> Iterator[int]:
    """A semaphore as the library makes it: 1 for the one who waits."""
    if capabilities.root():
        pytest.skip(capabilities.root())
    libc = ctypes.CDLL(None, use_errno=True)
    chosen = 0x0D4D0000 | os.getpid() & 0xFFFF
    found = libc.semget(chosen, 1, 0o600 | IPC_CREAT | IPC_EXCL)
    assert found >= 0, os.strerror(ctypes.get_errno())
    assert libc.semctl(found, 0, SETVAL, 1) == 0
    yield chosen
    if not is_gone(chosen):
        semaphore.remove(found)


def is_gone(key: int) -> bool:
    try:
        semaphore.find(key)
    except OSError as err:
        return err.errno == errno.ENOENT
    return False


def raise_by_one(key: int) -> None:
    """What the library does for an event."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.semctl(semaphore.find(key), 0, SETVAL, 2) == 0


def test_a_cookie_without_an_event_waits_for_nobody(key, monkeypatch):
    monkeypatch.setattr(libdm, "create_cookie", lambda: key)
    with udev_cookie.cookie("nothing", timeout=60):
        pass
    assert is_gone(key)


def test_a_cookie_is_waited_for(key, monkeypatch):
    monkeypatch.setattr(libdm, "create_cookie", lambda: key)
    completed = threading.Event()

    def udev() -> None:
        assert not completed.wait(0.2)
        completed.set()
        semaphore.decrement(semaphore.find(key))

    thread = threading.Thread(target=udev)
    with udev_cookie.cookie("an event", timeout=60):
        raise_by_one(key)
        thread.start()
    assert completed.is_set()
    thread.join()
    assert is_gone(key)


def test_a_cookie_that_nobody_completes_ends_in_an_error(key, monkeypatch):
    monkeypatch.setattr(libdm, "create_cookie", lambda: key)
    start = time.monotonic()
    with (
        pytest.raises(EngineError, match="did not complete an event within 0 seconds") as error,
        udev_cookie.cookie("an event", timeout=0.3),
    ):
        raise_by_one(key)
    assert time.monotonic() - start >= 0.3
    assert error.value.hint
    assert is_gone(key)


def test_a_cookie_that_is_removed_meanwhile_is_done(key, monkeypatch):
    monkeypatch.setattr(libdm, "create_cookie", lambda: key)
    remover = threading.Timer(0.2, lambda: semaphore.remove(semaphore.find(key)))
    with udev_cookie.cookie("an event", timeout=60):
        raise_by_one(key)
        remover.start()
    remover.join()
    assert is_gone(key)


def test_an_error_destroys_the_cookie_and_waits_for_nobody(key, monkeypatch):
    monkeypatch.setattr(libdm, "create_cookie", lambda: key)
    waiting = udev_cookie.cookie("an event", timeout=60)
    waiting.__enter__()
    raise_by_one(key)
    assert not waiting.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert is_gone(key)


def test_without_udev_there_is_no_cookie(monkeypatch):
    monkeypatch.setattr(libdm, "create_cookie", lambda: 0)
    with udev_cookie.cookie("an event") as found:
        assert found == 0


def test_locks_are_of_one_device_each(runtime_base):
    locks = PoolLocks("pool")
    with locks.suspension("one"):
        with locks.abandoned("one") as is_abandoned:
            assert not is_abandoned
        with locks.abandoned("two") as is_abandoned, locks.change("one"), locks.metadata():
            assert is_abandoned
    with locks.abandoned("one") as is_abandoned:
        assert is_abandoned
    assert [path.name for path in runtime_base.iterdir()] == [".lock-pool"]


def test_names():
    for name in ("docker-8:1-42-base", "a+b#c=d@e.f", "x" * 127):
        assert check_plain(name, "device") == name
    for name in ("a b", "ü", "a~b", "a\\b", ".a", "", "x" * 128, "a/b"):
        with pytest.raises(UsageError):
            check_plain(name, "device")


def test_the_library_is_loaded_by_need_only(caplog):
    """Setting the level of its log needs no library, and no device mapper."""
    libdm.set_log_level(7)
    try:
        with caplog.at_level(logging.DEBUG, "devmapper.libdm"):
            libdm._log(3, b"ioctl.c", 12, 0, b"%s failed: %d of %s", *_words())
            libdm._log(0x80 | 4, b"ioctl.c", 13, 0, b"a warning, with a flag", *[None] * 10)
        assert [record.getMessage() for record in caplog.records] == [
            "ioctl.c:12 (0) create failed: 5 of pool",
            "ioctl.c:13 (0) a warning, with a flag",
        ]
        assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    finally:
        libdm.set_log_level(2)
    caplog.clear()
    libdm._log(3, b"ioctl.c", 12, 0, b"not told", *[None] * 10)
    assert caplog.records == []


_STRINGS = [ctypes.create_string_buffer(text) for text in (b"create", b"pool")]


def _words() -> list[int | None]:
    first, second = (ctypes.addressof(text) for text in _STRINGS)
    return [first, 5, second, *[None] * 7]
