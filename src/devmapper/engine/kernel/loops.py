"""Loop devices below a pool: the kernel takes block devices, our callers may name files."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from devmapper.engine.claims import check_unclaimed
from devmapper.engine.port import PoolTable
from devmapper.errors import EnvironmentLacking
from devmapper.linux import blockdev, loop


@contextmanager
def block_devices(table: PoolTable) -> Iterator[PoolTable]:
    """*table* with a loop device in place of each file.

    The loop devices go with their last user: with the pool, or at the end of this context if there
    is no pool then.
    """
    with ExitStack() as stack:
        metadata, data = (
            stack.enter_context(_block_device(path))
            for path in (table.metadata_device, table.data_device)
        )
        yield table._replace(metadata_device=metadata, data_device=data)


def as_in(active: PoolTable, wanted: PoolTable) -> PoolTable:
    """*wanted* with the devices as *active* spells them, where they are the same ones."""
    return wanted._replace(
        metadata_device=_spelled_as(active.metadata_device, wanted.metadata_device),
        data_device=_spelled_as(active.data_device, wanted.data_device),
    )


def take_new_sizes(table: PoolTable) -> None:
    """Let the loop devices of a pool have the sizes that their files have now."""
    for device in (table.metadata_device, table.data_device):
        if _loop_status(device) is not None:
            loop.set_capacity(device)


def backing_file(device: Path) -> Path | None:
    """The file that a loop device stands on."""
    status = _loop_status(device)
    return None if status is None else status.backing_file


@contextmanager
def _block_device(path: Path) -> Iterator[Path]:
    if not path.is_file():
        yield Path(os.path.realpath(path))
        return
    check_unclaimed(path)
    try:
        # As Docker's: through the page cache, so that what was just written is read from memory
        with loop.attached_until_unused(path, direct_io=False) as node:
            yield node
    except OSError as err:
        if err.errno == errno.ENODEV and err.filename == "/dev/loop-control":
            raise EnvironmentLacking(
                "no loop device is free",
                hint="load the module loop, or allow this container /dev/loop-control",
            ) from err
        raise


def _spelled_as(active: Path, wanted: Path) -> Path:
    """*active* if both are one device, or *wanted* is the file that *active* stands on."""
    try:
        found = wanted.stat()
    except OSError:
        return wanted
    if found.st_rdev:
        return active if _number(active) == blockdev.device_number(wanted) else wanted
    status = _loop_status(active)
    return active if status is not None and status.backs(found) else wanted


def _number(device: Path) -> blockdev.DeviceNumber | None:
    with suppress(OSError):
        return blockdev.device_number(device)
    return None


def _loop_status(device: Path) -> loop.LoopStatus | None:
    number = _number(device)
    if number is None or number.major != loop.LOOP_MAJOR:
        return None
    return loop.find_status(device)
