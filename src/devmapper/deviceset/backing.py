"""One half of a pool: a loop file in the graph's home, or a device that the user named."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

from devmapper.errors import PoolNotFound
from devmapper.linux import blockdev, loop
from devmapper.linux.files import make_sparse, sync_directory
from devmapper.units import Bytes

log = logging.getLogger(__name__)


class Backing(NamedTuple):
    """What holds one half of the pool."""

    device: Path
    loop_file: Path | None  # the file in the graph's home, unless the user named a device

    def loop_file_of(self, device: Path) -> str:
        """The loop file if the pool's half is on *device*; else "".

        Whichever process made the pool: *device* is the file itself (embedded engine), or a loop
        device of which the kernel says that it stands on the file, whatever its number.
        """
        if self.loop_file is None or not self.stands_on(device):
            return ""
        return str(self.loop_file)

    def stands_on(self, device: Path) -> bool:
        """Whether *device*, of an active pool, is this half, directly or by a loop device."""
        if os.path.realpath(self.device) == os.path.realpath(device):
            return True
        try:
            own, other = self.device.stat(), device.stat()
        except FileNotFoundError:
            return False
        if os.path.samestat(own, other) or (own.st_rdev and own.st_rdev == other.st_rdev):
            return True
        if not is_loop_device(device):
            return False
        status = loop.find_status(device)
        return status is not None and status.backs(own)

    def ensure(self, size: Bytes, *, create: bool) -> bool:
        """Make a missing loop file of *size* bytes, durably; whether that was needed."""
        if self.loop_file is None or self.loop_file.exists():
            return False
        if not create:
            raise PoolNotFound(
                f"loop file {str(self.loop_file)!r} does not exist",
                hint="the graph's home is another one, or was never initialised",
            )
        directory = self.loop_file.parent
        if not directory.is_dir():
            directory.mkdir(mode=0o700)
            sync_directory(directory.parent)
        make_sparse(self.loop_file, size)
        log.info("made loop file %s of %d bytes", self.loop_file, size)
        return True

    def enlarge(self, size: Bytes) -> bool:
        """Let the loop file have at least *size* bytes, durably; whether that was needed."""
        if self.loop_file is None:
            return False
        found = blockdev.size(self.loop_file)
        if size <= found:
            if size < found:
                log.info(
                    "loop file %s keeps its %d bytes: %d were asked for, and it cannot shrink",
                    self.loop_file,
                    found,
                    size,
                )
            return False
        grow_file(self.loop_file, size)
        log.info("loop file %s grew from %d to %d bytes", self.loop_file, found, size)
        return True


def grow_file(path: Path, size: Bytes) -> None:
    """Give a file more bytes, as a hole at its end, durably."""
    with blockdev.opened(path, os.O_RDWR) as fd:
        os.ftruncate(fd, size)
        os.fsync(fd)


def is_loop_device(path: Path) -> bool:
    """Whether *path* is a loop device; by its number, whatever its node is called."""
    return blockdev.is_block_device(path) and blockdev.device_number(path).major == loop.LOOP_MAJOR


def take_file_size(device: Path) -> None:
    """Let a loop device have the size of its file; nothing to do for any other device or a file."""
    if is_loop_device(device):
        loop.set_capacity(device)
