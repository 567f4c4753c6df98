"""The devices that the user named for a pool, checked before anything is touched.

Docker opens them and lets the kernel fail, or format what it should not have.  Whoever names the
wrong disk loses what is on it with the first layer, so everything that can be seen from outside is
looked at first, and nothing here writes.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.errors import (
    DeviceBusy,
    EnvironmentLacking,
    IntegrityError,
    PoolMismatch,
    UsageError,
)
from devmapper.linux import blockdev, disks
from devmapper.thin.format import BLOCK_SIZE, ENTRIES_PER_BITMAP, MAGIC, SpaceMapRoot, Superblock
from devmapper.units import Bytes

_MIN_METADATA_BLOCKS: Final = 16  # as dm.loopmetadatasize takes
_HINT: Final = "check dm.datadev and dm.metadatadev"
_NOTHING_CHANGED: Final = "nothing was changed"


class Named(NamedTuple):
    """A half of the pool that the user named: the option, and what it names."""

    option: str
    path: Path


def check_devices(named: list[Named]) -> None:
    """Each exists, can be read and written, and belongs to nobody; the two are not one."""
    for device in named:
        _check_kind(device)
    if len(named) == 2 and disks.overlaps(named[0].path, named[1].path):
        first, second = named
        raise UsageError(
            f"{first.option} {str(first.path)!r} and {second.option} {str(second.path)!r} share"
            " their storage",
            hint="a pool needs two devices; LVM or partitions make two of one",
        )
    for device in named:
        _check_access(device)
        _check_unused(device)


def peek_superblock(metadata: Path) -> Superblock | None:
    """The superblock unchecked, None if the first block is blank or missing."""
    with open(metadata, "rb") as file:
        raw = file.read(BLOCK_SIZE)
    if len(raw) < BLOCK_SIZE or not any(raw):
        return None
    return Superblock.unpack(raw)


def check_holds_pool(metadata: Path, superblock: Superblock) -> None:
    """What is not blank has to be a pool; whether a pool is sound is the engine's affair.

    The kernel says of both the same (EINVAL, and a checksum in its log).
    """
    if superblock.magic == MAGIC:
        return
    found = disks.signatures(metadata)
    what = f"holds {found[0]}" if found else "is neither blank nor a pool's"
    raise PoolMismatch(
        f"metadata device {str(metadata)!r} {what}",
        hint="if what it holds may be lost: dd if=/dev/zero of=DEVICE bs=4096 count=1",
    )


def check_nothing_lost(named: list[Named]) -> None:
    """None of *named* holds something that a new pool would destroy.

    Blank metadata are no licence: the first 64 KiB of a btrfs are blank too.
    """
    for device in named:
        found = disks.signatures(device.path)
        if found:
            raise PoolMismatch(
                f"{device.option} {str(device.path)!r} is to become part of a new pool, but it"
                f" holds {', '.join(map(str, found))}",
                hint=f"if that may be lost: wipefs --all {device.path}",
            )
        parts = disks.partitions(device.path) if blockdev.is_block_device(device.path) else []
        if parts:
            raise PoolMismatch(
                f"{device.option} {str(device.path)!r} has partitions: {', '.join(parts)}",
                hint=_NOTHING_CHANGED,
            )


def check_sizes(data_size: Bytes, metadata_size: Bytes, block: Bytes) -> None:
    """A new pool of blocks of *block* bytes fits."""
    if data_size < block:
        raise PoolMismatch(
            f"data device has {data_size} bytes, which is less than one data block of {block}",
            hint=_NOTHING_CHANGED,
        )
    needed = minimum_metadata(data_size, block)
    if metadata_size < needed:
        raise PoolMismatch(
            f"metadata device has {metadata_size} bytes, but a pool of {data_size} needs {needed}"
            " at least",
            hint="1% of the data device is plenty; larger data blocks (dm.blocksize) need less",
        )


def minimum_metadata(data_size: Bytes, block: Bytes) -> Bytes:
    """Bytes without which no pool can be made: bitmaps of all data, and the trees' first blocks."""
    bitmaps = data_size // block // ENTRIES_PER_BITMAP + 1
    return Bytes(BLOCK_SIZE * max(_MIN_METADATA_BLOCKS, bitmaps + bitmaps // 50 + 12))


def data_size_of(superblock: Superblock) -> Bytes:
    """How large the pool is, as its metadata say; unchecked."""
    blocks = SpaceMapRoot.unpack(superblock.data_space_map_root).nr_blocks
    return Bytes(blocks * superblock.block_size)


def is_whole(metadata: Path, data_size: Bytes) -> bool:
    """Whether the superblock is sound and neither half is shorter than it says.

    Blank metadata are whole: there is no pool yet.
    """
    # Checksums take a library of their own, which a start without a larger size does not need
    from devmapper.thin.blocks import FileDevice
    from devmapper.thin.superblock import is_blank, read_superblock

    try:
        with FileDevice.open(metadata, read_only=True) as device:
            if device.nr_blocks == 0 or is_blank(device):
                return True
            superblock = read_superblock(device)
            blocks = SpaceMapRoot.unpack(superblock.metadata_space_map_root).nr_blocks
            return blocks <= device.nr_blocks and data_size_of(superblock) <= data_size
    except IntegrityError:
        return False


def _check_kind(device: Named) -> None:
    try:
        mode = device.path.stat().st_mode
    except OSError as err:
        missing = err.errno in (errno.ENOENT, errno.ENOTDIR)
        what = "does not exist" if missing else f"cannot be looked at: {err.strerror}"
        raise EnvironmentLacking(f"device {str(device.path)!r} {what}", hint=_HINT) from err
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        raise UsageError(
            f"{device.option} {str(device.path)!r} is neither a block device nor a file", hint=_HINT
        )


def _check_access(device: Named) -> None:
    try:
        os.close(os.open(device.path, os.O_RDWR | os.O_CLOEXEC))
        read_only = blockdev.is_block_device(device.path) and blockdev.is_read_only(device.path)
        with blockdev.opened(device.path, os.O_RDONLY) as fd:
            os.pread(fd, BLOCK_SIZE, 0)
    except OSError as err:
        raise EnvironmentLacking(
            f"device {str(device.path)!r} cannot be read and written: {err.strerror}", hint=_HINT
        ) from err
    if read_only:
        raise EnvironmentLacking(
            f"device {str(device.path)!r} is read-only",
            hint=f"blockdev --setrw {device.path}, if the disk itself takes writes",
        )


def _check_unused(device: Named) -> None:
    users = disks.users(device.path)
    if users:
        raise DeviceBusy(device.path, users)
