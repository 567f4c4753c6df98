"""Loop devices (loop(4), linux/loop.h).

Everything is asked of the kernel: no list of our own says which device is attached to what.  Every
step can race with other programs that attach and detach, so each is tried and its errno read.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from fcntl import ioctl
from pathlib import Path
from struct import Struct
from typing import Any, Final, NamedTuple

from devmapper.linux.blockdev import DeviceNumber, opened
from devmapper.units import Bytes

_LOOP_SET_FD: Final = 0x4C00
_LOOP_CLR_FD: Final = 0x4C01
_LOOP_SET_STATUS64: Final = 0x4C04
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_SET_CAPACITY: Final = 0x4C07
_LOOP_SET_DIRECT_IO: Final = 0x4C08
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_ADD: Final = 0x4C80
_LOOP_CTL_GET_FREE: Final = 0x4C82

_LO_FLAGS_READ_ONLY: Final = 1
_LO_FLAGS_AUTOCLEAR: Final = 4
_LO_FLAGS_DIRECT_IO: Final = 16

# struct loop_info64: device inode rdevice offset sizelimit, number encrypt_type encrypt_key_size
# flags, file_name crypt_name encrypt_key, init[2]
_INFO: Final = Struct("=5Q4I64s64s32s2Q")
_FLAGS_FIELD: Final = 8
_CONFIG_HEAD: Final = Struct("=2I")  # struct loop_config: fd block_size, loop_info64, reserved[8]
_CONFIG_RESERVED: Final = bytes(64)
_NAME_LENGTH: Final = 64
_SYSFS_PAGE: Final = 1 << 16  # of the largest pages; an attribute has one at most

LOOP_MAJOR: Final = 7
_CONTROL: Final = Path("/dev/loop-control")
_DELETED: Final = " (deleted)"
_ATTACH_TRIES: Final = 64
_RACE_PAUSE_SECONDS: Final = 0.005
_NOT_ATTACHED: Final = frozenset({errno.ENXIO, errno.ENODEV, errno.ENOENT})


class Detached(StrEnum):
    """What became of a device that should go away."""

    GONE = "gone"
    ALREADY = "already"  # nothing was attached
    DEFERRED = "deferred"  # in use; goes away when the last user closes it


class LoopStatus(NamedTuple):
    """What LOOP_GET_STATUS64 and sysfs say about an attached device."""

    path: Path
    device: DeviceNumber  # of the file system that holds the backing file
    inode: int  # of the backing file
    offset: int
    size_limit: int
    backing_file: Path
    read_only: bool
    autoclear: bool
    direct_io: bool

    def backs(self, file: os.stat_result) -> bool:
        """Whether the device stands on the file that *file* describes."""
        device = DeviceNumber(os.major(file.st_dev), os.minor(file.st_dev))
        return self.inode == file.st_ino and self.device == device


def attach(
    backing: Path, *, direct_io: bool = True, read_only: bool = False, autoclear: bool = False
) -> Path:
    """Attach a free loop device to *backing* and return its node, such as `/dev/loop3`.

    Direct I/O is a wish: where the file system cannot, the kernel leaves it off (`status` tells).
    ENODEV if the machine has no loop devices or has run out of them.
    """
    with _attached_open(
        backing, direct_io=direct_io, read_only=read_only, autoclear=autoclear
    ) as node:
        return node


@contextmanager
def attached_until_unused(
    backing: Path, *, direct_io: bool = True, read_only: bool = False
) -> Iterator[Path]:
    """A loop device that goes away with its last user, of which this context is one.

    Who shall keep it has to open it meanwhile.  Killed or not, nothing is left behind.
    """
    with _attached_open(backing, direct_io=direct_io, read_only=read_only, autoclear=True) as node:
        yield node


@contextmanager
def _attached_open(
    backing: Path, *, direct_io: bool, read_only: bool, autoclear: bool
) -> Iterator[Path]:
    flags = (_LO_FLAGS_READ_ONLY if read_only else 0) | (_LO_FLAGS_AUTOCLEAR if autoclear else 0)
    mode = os.O_RDONLY if read_only else os.O_RDWR
    with opened(backing, mode) as fd:
        for _ in range(_ATTACH_TRIES):
            node = _free_node()
            with ExitStack() as stack:
                try:
                    device = stack.enter_context(opened(node, mode))
                    _configure(device, node, fd, backing, flags, direct_io=direct_io)
                except OSError as err:
                    # Somebody else was faster (EBUSY), or removed the device (ENXIO, ENODEV)
                    if err.errno not in (errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOENT):
                        raise
                else:
                    yield node
                    return
            time.sleep(_RACE_PAUSE_SECONDS)
    raise OSError(errno.ENODEV, "no free loop device", str(_CONTROL))


@contextmanager
def attached(
    backing: Path, *, direct_io: bool = True, read_only: bool = False, timeout: float = 5.0
) -> Iterator[Path]:
    """A loop device for the duration; EBUSY if it is still in use *timeout* seconds afterwards."""
    node = attach(backing, direct_io=direct_io, read_only=read_only)
    try:
        yield node
    finally:
        detach(node, timeout=timeout)


def detach(path: Path, *, deferred: bool = False, timeout: float = 0.0) -> Detached:
    """Detach a loop device; one that is in use: EBUSY, or DEFERRED if the caller wants that.

    LOOP_CLR_FD on a device in use only marks it to go away on its last close (autoclear).  Where
    that was not asked for, the mark is taken off again, and what is in use stays as it was.
    """
    before = _attachment(path)
    if before is None:
        return Detached.ALREADY
    deadline = time.monotonic() + timeout
    while True:
        _clear(path)
        now = _attachment(path)
        if now is None or now.backing_file != before.backing_file:
            return Detached.GONE
        if deferred:
            return Detached.DEFERRED
        if not before.autoclear and not _take_off_autoclear(path):
            return Detached.GONE
        if time.monotonic() >= deadline:
            raise OSError(errno.EBUSY, "loop device is in use", str(path))
        time.sleep(_RACE_PAUSE_SECONDS * 4)


def cancel_autoclear(path: Path) -> bool:
    """Keep an attached device that would go away on its last close.

    True if it was about to go, False if nothing had to be changed; ENXIO if nothing is attached.
    """
    with opened(path, os.O_RDONLY) as fd:
        fields = list(_get_status(fd, path))
        if not fields[_FLAGS_FIELD] & _LO_FLAGS_AUTOCLEAR:
            return False
        fields[_FLAGS_FIELD] &= ~_LO_FLAGS_AUTOCLEAR
        _ioctl(fd, _LOOP_SET_STATUS64, _INFO.pack(*fields), "LOOP_SET_STATUS64", path)
        return True


def set_capacity(path: Path) -> None:
    """Let the device take the size that its backing file has now."""
    with opened(path, os.O_RDONLY) as fd:
        _ioctl(fd, _LOOP_SET_CAPACITY, 0, "LOOP_SET_CAPACITY", path)


def status(path: Path) -> LoopStatus:
    """What *path* is attached to; ENXIO if it is not attached."""
    with opened(path, os.O_RDONLY) as fd:
        fields = _get_status(fd, path)
    device = fields[0]
    flags = fields[_FLAGS_FIELD]
    return LoopStatus(
        path,
        # The kernel reports huge_encode_dev, which is what os.major and os.minor take apart
        DeviceNumber(os.major(device), os.minor(device)),
        fields[1],
        fields[3],
        fields[4],
        Path(_backing_file(path.name) or os.fsdecode(fields[9].rstrip(b"\0"))),
        bool(flags & _LO_FLAGS_READ_ONLY),
        bool(flags & _LO_FLAGS_AUTOCLEAR),
        bool(flags & _LO_FLAGS_DIRECT_IO),
    )


def find_status(path: Path) -> LoopStatus | None:
    """`status`, or None if nothing is attached or the node is not there."""
    try:
        return status(path)
    except OSError as err:
        if err.errno in _NOT_ATTACHED:
            return None
        raise


def find_by_backing_file(backing: Path) -> list[Path]:
    """The loop devices on *backing*, lowest number first, as sysfs lists them.

    By name, without opening anything: that works for a file whose file system is dead, and for
    one that was deleted (the kernel then adds ` (deleted)` to its name).
    """
    wanted = os.path.realpath(backing.parent) + "/" + backing.name
    found = (number for number, name in _attached() if name.removesuffix(_DELETED) == wanted)
    return [Path(f"/dev/loop{number}") for number in sorted(found)]


def find_by_inode(file: os.stat_result) -> list[LoopStatus]:
    """The loop devices on the file that *file* describes, under whatever name they were attached.

    Opens every attached device for a moment, unlike `find_by_backing_file`.
    """
    found = []
    for node, _ in attached_devices():
        try:
            attached_to = find_status(node)
        except OSError as err:
            # The status comes with attributes of the backing file, which a dead file system (FUSE
            # without its server) does not give: it is not the caller's file, whose were read
            if err.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ESTALE):
                raise
            continue
        if attached_to is not None and attached_to.backs(file):
            found.append(attached_to)
    return found


def attached_devices() -> list[tuple[Path, Path]]:
    """Every attached loop device and the name of its backing file, as the kernel spells it."""
    return [(Path(f"/dev/loop{number}"), Path(name)) for number, name in sorted(_attached())]


def _attached() -> Iterator[tuple[int, str]]:
    """Numbers and backing files, in no order.  A machine may have hundreds, asked for often."""
    for entry in os.listdir("/sys/block"):
        number = entry.removeprefix("loop")
        if number != entry and number.isdigit() and (name := _backing_file(entry)) is not None:
            yield int(number), name


def capacity(path: Path) -> Bytes:
    """Size of the device in bytes as sysfs has it; 0 while nothing is attached."""
    sectors = int(Path(f"/sys/block/{path.name}/size").read_text(encoding="ascii"))
    return Bytes(sectors * 512)


def is_open_exclusively(path: Path) -> bool:
    """Whether somebody claims the block device: a mounted file system, swap, another device.

    A plain open by a program does not count.
    """
    try:
        with opened(path, os.O_RDONLY | os.O_EXCL):
            return False
    except OSError as err:
        if err.errno == errno.EBUSY:
            return True
        raise


def _free_node() -> Path:
    try:
        with opened(_CONTROL, os.O_RDWR) as control:
            number = ioctl(control, _LOOP_CTL_GET_FREE)
            with suppress(FileExistsError):
                ioctl(control, _LOOP_CTL_ADD, number)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENOSPC, errno.ENODEV, errno.ENXIO):
            message = f"no free loop device: {os.strerror(err.errno)}"
            raise OSError(errno.ENODEV, message, str(_CONTROL)) from err
        raise OSError(err.errno, f"loop control: {err.strerror}", str(_CONTROL)) from err
    node = Path(f"/dev/loop{number}")
    if not node.exists():
        # A container's /dev is often a plain tmpfs where no udev adds nodes
        with suppress(FileExistsError):
            os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(LOOP_MAJOR, number))
    return node


def _configure(
    device: int, node: Path, fd: int, backing: Path, flags: int, *, direct_io: bool
) -> None:
    wanted = flags | (_LO_FLAGS_DIRECT_IO if direct_io else 0)
    config = _CONFIG_HEAD.pack(fd, 0) + _info(backing, wanted) + _CONFIG_RESERVED
    try:
        ioctl(device, _LOOP_CONFIGURE, config)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTTY):
            message = f"LOOP_CONFIGURE for {str(backing)!r}: {err.strerror}"
            raise OSError(err.errno, message, str(node)) from err
    else:
        return
    # Before Linux 5.8 there are only the separate steps
    _ioctl(device, _LOOP_SET_FD, fd, "LOOP_SET_FD", node)
    try:
        _ioctl(device, _LOOP_SET_STATUS64, _info(backing, flags), "LOOP_SET_STATUS64", node)
        if direct_io:
            with suppress(OSError):  # a wish, as with LOOP_CONFIGURE
                ioctl(device, _LOOP_SET_DIRECT_IO, 1)
    except OSError:
        ioctl(device, _LOOP_CLR_FD)
        raise


def _info(backing: Path, flags: int) -> bytes:
    name = os.fsencode(backing)[: _NAME_LENGTH - 1]
    return _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)


def _clear(path: Path) -> None:
    try:
        with opened(path, os.O_RDONLY) as fd:
            ioctl(fd, _LOOP_CLR_FD)
    except OSError as err:
        # ENXIO: gone meanwhile.  EBUSY: kernels before 3.7 that do not defer
        if err.errno not in (errno.ENXIO, errno.ENODEV, errno.EBUSY):
            raise OSError(err.errno, f"LOOP_CLR_FD: {err.strerror}", str(path)) from err


def _take_off_autoclear(path: Path) -> bool:
    """Let an attached device stay; False if it went away first."""
    try:
        cancel_autoclear(path)
    except OSError as err:
        if err.errno in (errno.ENXIO, errno.ENODEV):
            return False
        # The status of a device whose file system has died cannot be had; it is in use all the same
        if err.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            raise
    return True


class _Attachment(NamedTuple):
    backing_file: Path
    autoclear: bool


def _attachment(path: Path) -> _Attachment | None:
    """What sysfs says, which asks nothing of the file system below the device."""
    backing_file = _backing_file(path.name)
    if backing_file is None:
        return None
    try:
        text = Path(f"/sys/block/{path.name}/loop/autoclear").read_text(encoding="ascii")
    except OSError as err:
        if err.errno in _NOT_ATTACHED:
            return None
        raise
    return _Attachment(Path(backing_file), text.strip() == "1")


def _backing_file(name: str) -> str | None:
    try:
        fd = os.open(f"/sys/block/{name}/loop/backing_file", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, _SYSFS_PAGE)
        finally:
            os.close(fd)
    except OSError as err:
        if err.errno in _NOT_ATTACHED:
            return None
        raise
    return os.fsdecode(text.removesuffix(b"\n"))


def _get_status(fd: int, path: Path) -> tuple[Any, ...]:
    buffer = bytearray(_INFO.size)
    _ioctl(fd, _LOOP_GET_STATUS64, buffer, "LOOP_GET_STATUS64", path)
    return _INFO.unpack(buffer)


def _ioctl(fd: int, request: int, argument: bytes | bytearray | int, name: str, path: Path) -> None:
    try:
        ioctl(fd, request, argument)
    except OSError as err:
        raise OSError(err.errno, f"{name}: {err.strerror}", str(path)) from err
