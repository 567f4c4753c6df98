"""libdevmapper 1.02.1 (libdevmapper.h), the library that talks to the kernel's device mapper.

One table of signatures, and tasks only inside of `task`, which frees them on every path.  Errors
are `OSError` with the errno of the ioctl.  The library is loaded when it is first needed: importing
this module costs nothing on a machine that has none.

The library is not thread-safe, so one private lock (L3, docs/internals/locking.md) is held from
creating a task to destroying it.  Nothing is waited for inside: not for udev (`udev_cookie`), and
the one ioctl that waits for I/O, SUSPEND, runs without it.
"""

import atexit
import ctypes
import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint16, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any, Final, NamedTuple

from devmapper.linux.blockdev import DeviceNumber
from devmapper.units import Sectors

log = logging.getLogger("devmapper.libdm")

CONTROL: Final = Path("/dev/mapper/control")
_LIBRARY: Final = "libdevmapper.so.1.02.1"
_DEV_DIR: Final = b"/dev"
_MANGLE_NOTHING: Final = 0  # DM_STRING_MANGLING_NONE
_VERSION_LENGTH: Final = 64
_LOG_LEVEL_MASK: Final = 7  # the rest are flags: _LOG_STDERR, _LOG_ONCE …
_LOG_FATAL: Final = 2
_LOG_DEBUG: Final = 7
_LOG_WORDS: Final = 10  # arguments of a message that are looked at
_LOG_LENGTH: Final = 1024
_LOG_LEVELS: Final = {
    2: logging.CRITICAL,
    3: logging.ERROR,
    4: logging.WARNING,
    5: logging.INFO,
    6: logging.INFO,
    7: logging.DEBUG,
}


class TaskKind(IntEnum):
    """The DM_DEVICE_* that we use."""

    CREATE = 0
    RELOAD = 1
    REMOVE = 2
    SUSPEND = 4
    RESUME = 5
    INFO = 6
    VERSION = 9
    STATUS = 10
    TABLE = 11
    LIST_VERSIONS = 16
    MESSAGE = 17  # DM_DEVICE_TARGET_MSG
    TARGET_VERSION = 20  # DM_DEVICE_GET_TARGET_VERSION; loads the target's module


class UdevFlag(IntFlag):
    """DM_UDEV_*: what udev's rules leave out for the event that a task makes."""

    DISABLE_SUBSYSTEM_RULES = 0x02
    DISABLE_DISK_RULES = 0x04
    DISABLE_OTHER_RULES = 0x08
    DISABLE_LIBRARY_FALLBACK = 0x20


class DeviceState(NamedTuple):
    """What every task tells about its device (`struct dm_info`)."""

    number: DeviceNumber
    suspended: bool
    live_table: bool
    inactive_table: bool
    open_count: int
    read_only: bool
    deferred_remove: bool


class Target(NamedTuple):
    """One line of a table or of a status."""

    start: Sectors
    length: Sectors
    kind: str
    params: str


class _Info(ctypes.Structure):
    # The layout since 1.02.97, which is that of the default version of dm_task_get_info
    _fields_ = (
        ("exists", c_int),
        ("suspended", c_int),
        ("live_table", c_int),
        ("inactive_table", c_int),
        ("open_count", c_int32),
        ("event_nr", c_uint32),
        ("major", c_uint32),
        ("minor", c_uint32),
        ("read_only", c_int),
        ("target_count", c_int32),
        ("deferred_remove", c_int),
        ("internal_suspend", c_int),
    )


class _Versions(ctypes.Structure):
    # struct dm_versions; the name follows
    _fields_ = (("next", c_uint32), ("version", c_uint32 * 3))


_SIGNATURES: Final[dict[str, tuple[list[Any], Any]]] = {
    "dm_get_library_version": ([c_char_p, c_size_t], c_int),
    "dm_get_next_target": (
        [pointer, pointer, *[POINTER(c_uint64)] * 2, *[POINTER(c_char_p)] * 2],
        pointer,
    ),
    "dm_hold_control_dev": ([c_int], None),
    "dm_log_with_errno_init": ([pointer], None),
    "dm_set_dev_dir": ([c_char_p], c_int),
    "dm_set_name_mangling_mode": ([c_int], c_int),
    "dm_task_add_target": ([pointer, c_uint64, c_uint64, c_char_p, c_char_p], c_int),
    "dm_task_create": ([c_int], pointer),
    "dm_task_deferred_remove": ([pointer], c_int),
    "dm_task_destroy": ([pointer], None),
    "dm_task_get_driver_version": ([pointer, c_char_p, c_size_t], c_int),
    "dm_task_get_errno": ([pointer], c_int),
    "dm_task_get_info": ([pointer, POINTER(_Info)], c_int),
    "dm_task_get_versions": ([pointer], pointer),
    "dm_task_no_flush": ([pointer], c_int),
    "dm_task_run": ([pointer], c_int),
    "dm_task_set_cookie": ([pointer, POINTER(c_uint32), c_uint16], c_int),
    "dm_task_set_message": ([pointer, c_char_p], c_int),
    "dm_task_set_name": ([pointer, c_char_p], c_int),
    "dm_task_set_sector": ([pointer, c_uint64], c_int),
    "dm_task_update_nodes": ([], None),
    "dm_udev_create_cookie": ([POINTER(c_uint32)], c_int),
    "dm_udev_get_sync_support": ([], c_int),
}

_LOCK: Final = threading.Lock()  # L3
_LOG_CALLBACK: Final = ctypes.CFUNCTYPE(
    None, c_int, c_char_p, c_int, c_int, c_char_p, *[pointer] * _LOG_WORDS
)


class _State:
    """What this process has loaded; guarded by `_LOCK`."""

    library: ctypes.CDLL | None = None
    log_level: int = _LOG_FATAL
    callback: Any = None  # the library keeps a pointer to it


class Task:
    """One ioctl of device mapper being prepared; obtained from `task` only."""

    def __init__(self, lib: ctypes.CDLL, raw: int, kind: TaskKind, name: str) -> None:
        self._lib = lib
        self._raw = raw
        self._kind = kind
        self._name = name

    def add_target(self, target: Target) -> None:
        """Add a line to the table to be loaded."""
        self._check(
            self._lib.dm_task_add_target(
                self._raw,
                target.start,
                target.length,
                target.kind.encode("ascii"),
                os.fsencode(target.params),
            )
        )

    def set_message(self, text: str) -> None:
        self._check(self._lib.dm_task_set_sector(self._raw, 0))
        self._check(self._lib.dm_task_set_message(self._raw, text.encode("ascii")))

    def set_cookie(self, cookie: int, flags: UdevFlag) -> None:
        """Let udev confirm that it is done with the event; see `udev_cookie`."""
        value = c_uint32(cookie)
        self._check(self._lib.dm_task_set_cookie(self._raw, byref(value), int(flags)))

    def no_flush(self) -> None:
        """STATUS: as things are, without a commit first."""
        self._check(self._lib.dm_task_no_flush(self._raw))

    def defer(self) -> None:
        """REMOVE: a device in use goes away when its last user closes it."""
        self._check(self._lib.dm_task_deferred_remove(self._raw))

    def run(self) -> None:
        """The ioctl itself."""
        if self._kind is not TaskKind.SUSPEND:
            self._check(self._lib.dm_task_run(self._raw))
            return
        # It waits for I/O, in a full pool for a minute, and another thread may be the one that
        # makes room.  Of the library's state it touches no more than a counter of suspensions.
        _LOCK.release()
        try:
            ok = self._lib.dm_task_run(self._raw)
        finally:
            _LOCK.acquire()
        self._check(ok)

    def state(self) -> DeviceState | None:
        """The device as the ioctl has left it; None if there is none by that name."""
        info = _Info()
        self._check(self._lib.dm_task_get_info(self._raw, byref(info)))
        if not info.exists:
            return None
        return DeviceState(
            DeviceNumber(info.major, info.minor),
            suspended=bool(info.suspended),
            live_table=bool(info.live_table),
            inactive_table=bool(info.inactive_table),
            open_count=info.open_count,
            read_only=bool(info.read_only),
            deferred_remove=bool(info.deferred_remove),
        )

    def targets(self) -> list[Target]:
        """The lines of the table or of the status."""
        found = []
        start, length, kind, params = c_uint64(), c_uint64(), c_char_p(), c_char_p()
        following = None
        while True:
            following = self._lib.dm_get_next_target(
                self._raw, following, byref(start), byref(length), byref(kind), byref(params)
            )
            if kind.value is not None:
                words = os.fsdecode(params.value or b"")
                name = kind.value.decode("ascii")
                found.append(Target(Sectors(start.value), Sectors(length.value), name, words))
            if not following:
                return found

    def driver_version(self) -> str:
        buffer = ctypes.create_string_buffer(_VERSION_LENGTH)
        self._check(self._lib.dm_task_get_driver_version(self._raw, buffer, len(buffer)))
        return buffer.value.decode("ascii")

    def target_versions(self) -> dict[str, tuple[int, int, int]]:
        """LIST_VERSIONS, TARGET_VERSION: the targets that the kernel has now."""
        found = {}
        address = self._lib.dm_task_get_versions(self._raw)
        while address:
            entry = _Versions.from_address(address)
            name = ctypes.string_at(address + ctypes.sizeof(_Versions)).decode("ascii")
            if name:
                found[name] = (entry.version[0], entry.version[1], entry.version[2])
            address = address + entry.next if entry.next else 0
        return found

    def _check(self, ok: int) -> None:
        if ok:
            return
        # Where the library itself refuses there was no ioctl and so no errno
        number = self._lib.dm_task_get_errno(self._raw) or errno.EINVAL
        what = f"device mapper: {self._kind.name.lower()}: {os.strerror(number)}"
        raise OSError(number, what, self._name) if self._name else OSError(number, what)


@contextmanager
def task(kind: TaskKind, name: str = "") -> Iterator[Task]:
    """A task for the device *name*, freed on every path; ENODEV if device mapper is not there.

    L3 is held meanwhile: prepare, run, read, and wait for nothing.
    """
    with _LOCK:
        lib = _library()
        raw = lib.dm_task_create(kind)
        if not raw:
            raise OSError(errno.ENODEV, "device mapper does not answer", str(CONTROL))
        try:
            prepared = Task(lib, raw, kind, name)
            if name and not lib.dm_task_set_name(raw, os.fsencode(name)):
                raise OSError(errno.EINVAL, "no name for a device", name)
            yield prepared
        finally:
            lib.dm_task_destroy(raw)


def library_version() -> str:
    """As `1.02.185 (2022-05-18)`."""
    buffer = ctypes.create_string_buffer(_VERSION_LENGTH)
    with _LOCK:
        _library().dm_get_library_version(buffer, len(buffer))
    return buffer.value.decode("ascii")


def udev_sync_support() -> bool:
    """Whether udev runs and confirms what it has done (cookies)."""
    with _LOCK:
        return bool(_library().dm_udev_get_sync_support())


def create_cookie() -> int:
    """A fresh semaphore that udev counts down, by its key; 0 where there is no udev."""
    cookie = c_uint32()
    with _LOCK:
        lib = _library()
        if not lib.dm_udev_get_sync_support():
            return 0
        if not lib.dm_udev_create_cookie(byref(cookie)):
            raise OSError(errno.ENOSPC, "no semaphore for a udev cookie")
    return cookie.value


def update_nodes() -> None:
    """Make and remove the nodes in /dev/mapper that udev is not there to care for."""
    with _LOCK:
        _library().dm_task_update_nodes()


def set_log_level(level: int) -> None:
    """Pass on what the library says up to *level*: 2 fatal … 7 debug, as moby's DMLogLevel.

    It goes to the logger `devmapper.libdm` and decides nothing.
    """
    with _LOCK:
        _State.log_level = level
        if _State.library is not None:
            _install_log(_State.library)


def _library() -> ctypes.CDLL:
    """The library, loaded by the first caller; ENOENT if it is not installed."""
    if _State.library is not None:
        return _State.library
    try:
        lib = ctypes.CDLL(_LIBRARY)
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = arguments
            function.restype = result
    except (OSError, AttributeError) as err:
        raise OSError(errno.ENOENT, f"library cannot be used: {err}", _LIBRARY) from err
    _install_log(lib)
    # The library's destructor says what it has left undone, when there is no Python any more
    atexit.register(lib.dm_log_with_errno_init, None)
    lib.dm_set_dev_dir(_DEV_DIR)
    lib.dm_set_name_mangling_mode(_MANGLE_NOTHING)
    lib.dm_hold_control_dev(1)  # one open for the process, not one for each task
    _open_control(lib)
    _State.library = lib
    return lib


def _open_control(lib: ctypes.CDLL) -> None:
    """Have the library open its control node, and keep programs that we start from getting it."""
    raw = lib.dm_task_create(TaskKind.VERSION)
    if not raw:
        raise OSError(errno.ENODEV, "device mapper does not answer", str(CONTROL))
    lib.dm_task_destroy(raw)
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed by another thread meanwhile, or the listing's own
            if entry.readlink() == CONTROL:
                os.set_inheritable(int(entry.name), False)  # noqa: FBT003 - its only form


def _install_log(lib: ctypes.CDLL) -> None:
    if _State.callback is None:
        _State.callback = _LOG_CALLBACK(_log)
    lib.dm_log_with_errno_init(ctypes.cast(_State.callback, pointer))


def _log(
    level: int, file: bytes, line: int, dm_errno: int, message: bytes, *words: int | None
) -> None:
    """What the library calls for every message; *words* are what a C function finds as `...`."""
    kind = level & _LOG_LEVEL_MASK
    if kind > _State.log_level:
        return
    text = ctypes.create_string_buffer(_LOG_LENGTH)
    # Integers and pointers only, which is all that the library prints
    arguments = [pointer(word) for word in words]
    ctypes.CDLL(None).snprintf(text, c_size_t(len(text)), c_char_p(message), *arguments)
    where = os.fsdecode(file or b"?")
    said = text.value.decode(errors="replace")
    log.log(_LOG_LEVELS.get(kind, logging.DEBUG), "%s:%d (%d) %s", where, line, dm_errno, said)
