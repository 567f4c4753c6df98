"""A whole disk becomes a thin pool with LVM: Docker's direct-lvm (moby `device_setup.go`).

The names are Docker's, so that either program finds what the other has made.  The disk has to be
blank; if a step fails, what was done is undone in reverse.  A set-up that was killed leaves a
volume group with a tag by which the next one knows that it may begin anew.
"""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from devmapper.deviceset import setup_config
from devmapper.deviceset.options import DirectLvm, Options
from devmapper.deviceset.setup_config import POOL_NAME, POOL_VOLUME, VOLUME_GROUP, SetupConfig
from devmapper.errors import (
    DeviceBusy,
    DevmapperError,
    EnvironmentLacking,
    PoolMismatch,
    UsageError,
)
from devmapper.linux import blockdev, disks, lvm
from devmapper.linux.files import save_file, sync_directory, unlink_durably
from devmapper.linux.process import find_tool
from devmapper.units import MIB

log = logging.getLogger(__name__)

METADATA_VOLUME: Final = "thinpoolmeta"
PROFILE: Final = POOL_NAME
PROFILE_DIRECTORY: Final = Path("/etc/lvm/profile")

_POOL: Final = f"{VOLUME_GROUP}/{POOL_VOLUME}"
_CHUNK: Final = "512K"
_UNFINISHED: Final = "devmapper_setup_unfinished"  # a tag of the volume group
_MIN_DISK: Final = 512 * MIB  # 1% of it is one extent of LVM, the smallest metadata volume

# What dm.directlvm_device_force may overwrite, as Docker's check is for file systems only.  Labels
# of volumes (LVM, RAID, LUKS, ZFS …) and partition tables stand for more than one file system.
_FILE_SYSTEMS: Final = frozenset(
    {
        *("bfs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "hfsplus", "iso9660"),
        *("jfs", "minix", "nilfs2", "ntfs", "reiser4", "reiserfs", "squashfs", "udf", "ufs"),
        *("vfat", "xfs"),
    }
)


def set_up(home: Path, options: Options, *, has_layers: Callable[[], bool]) -> bool:
    """Make the pool that *options* ask for, unless it was made before; whether it was made now.

    Call under the graph's lock: nobody can work on the graph before it has a pool.
    """
    wanted = SetupConfig.of(options)
    if wanted is None:
        return False
    stored = setup_config.load(home)
    if stored is not None:
        setup_config.check_unchanged(stored, wanted)
        return False
    if has_layers():
        raise PoolMismatch(
            f"graph {str(home)!r} has layers in a pool of its own already",
            hint="a disk can become the pool of a new graph only",
        )
    disk = wanted.effective()._replace(force=options.directlvm_device_force)
    _check_tools()
    _remove_unfinished(disk.device)
    check_disk(disk)
    _make(disk, lambda: setup_config.save(home, wanted))
    return True


def check_disk(disk: DirectLvm) -> None:
    """Refuse a disk that holds anything; with *force* a file system on it may be lost."""
    device = disk.device
    if not device.exists():
        raise EnvironmentLacking(f"device {str(device)!r} does not exist")
    if not blockdev.is_block_device(device):
        raise UsageError(f"{str(device)!r} is not a block device", hint="name a whole, unused disk")
    if blockdev.is_read_only(device):
        raise EnvironmentLacking(f"device {str(device)!r} is read-only")
    size = blockdev.size(device)
    if size < _MIN_DISK:
        raise PoolMismatch(
            f"device {str(device)!r} has {size} bytes, expected {_MIN_DISK} at least"
        )
    users = disks.users(device)
    if users:
        raise DeviceBusy(device, users)
    parts = disks.partitions(device)
    if parts:
        raise PoolMismatch(
            f"device {str(device)!r} has partitions: {', '.join(parts)}",
            hint="name a disk without any; nothing was changed",
        )
    found = disks.signatures(device)
    lost = [signature for signature in found if signature.kind not in _FILE_SYSTEMS]
    if lost or (found and not disk.force):
        hint = f"if that may be lost: wipefs --all {device}"
        if not lost:
            hint += ", or dm.directlvm_device_force=true (--force)"
        raise PoolMismatch(
            f"device {str(device)!r} is not blank: it holds {', '.join(map(str, lost or found))}",
            hint=hint,
        )


def _check_tools() -> None:
    try:
        for tool in (*lvm.TOOLS, "thin_check"):
            find_tool(tool)
    except EnvironmentLacking as err:
        err.hint += (
            "; or make two partitions yourself and name them in dm.datadev and dm.metadatadev"
        )
        raise


def _make(disk: DirectLvm, keep: Callable[[], None]) -> None:
    """Every step is undone if it or a later one fails; *keep* is the last one."""
    device = str(disk.device)
    if lvm.find_volume_group(VOLUME_GROUP) is not None:
        raise PoolMismatch(
            f"there is a volume group {VOLUME_GROUP!r} already",
            hint="if its pool is to be used: dm.thinpooldev names it; nothing was changed",
        )
    with ExitStack() as undo:
        try:
            undo.callback(_undone, "pvremove", "-f", "-y", device)
            lvm.run("pvcreate", "-f", "-y", device)
            undo.callback(_undone, "vgremove", "-f", "-y", VOLUME_GROUP)
            lvm.run("vgcreate", "--addtag", _UNFINISHED, VOLUME_GROUP, device)
            for volume, percent in (
                (POOL_VOLUME, disk.thinp_percent),
                (METADATA_VOLUME, disk.thinp_metapercent),
            ):
                extents = f"{percent}%VG"
                lvm.run(
                    *("lvcreate", "-y", "--wipesignatures", "y", "--extents", extents),
                    *("--name", volume, VOLUME_GROUP),
                )
            lvm.run(
                *("lvconvert", "-y", "--zero", "n", "--chunksize", _CHUNK, "--thinpool", _POOL),
                *("--poolmetadata", f"{VOLUME_GROUP}/{METADATA_VOLUME}"),
            )
            _write_profile(disk, undo)
            lvm.run("lvchange", "--metadataprofile", PROFILE, _POOL)
            keep()
        except BaseException:
            log.info("setting up %s failed: undoing it", device)
            raise
        undo.pop_all()
    lvm.run("vgchange", "--deltag", _UNFINISHED, VOLUME_GROUP)
    log.info("made thin pool %s of %s", POOL_NAME, device)


def _write_profile(disk: DirectLvm, undo: ExitStack) -> None:
    """LVM's monitor (dmeventd) extends the pool by what the volume group has left."""
    path = PROFILE_DIRECTORY / f"{PROFILE}.profile"
    if not PROFILE_DIRECTORY.is_dir():
        PROFILE_DIRECTORY.mkdir(mode=0o755)
        sync_directory(PROFILE_DIRECTORY.parent)
    before = path.read_bytes() if path.exists() else None
    if before is None:
        undo.callback(unlink_durably, path, missing_ok=True)
    else:
        undo.callback(save_file, path, before, mode=0o644)
    text = (
        "activation {\n"
        f"\tthin_pool_autoextend_threshold={disk.autoextend_threshold}\n"
        f"\tthin_pool_autoextend_percent={disk.autoextend_percent}\n"
        "}\n"
    )
    save_file(path, text.encode("ascii"), mode=0o644)


def _remove_unfinished(device: Path) -> None:
    """Take away what a set-up that was killed has left, if it stands on *device* alone."""
    group = lvm.find_volume_group(VOLUME_GROUP)
    if group is None or _UNFINISHED not in group.tags:
        return
    if [os.path.realpath(each) for each in group.devices] != [os.path.realpath(device)]:
        return
    log.warning("an earlier set-up of %s was interrupted: beginning anew", device)
    lvm.run("vgremove", "-f", "-y", VOLUME_GROUP)
    lvm.run("pvremove", "-f", "-y", str(device))


def _undone(*argv: str) -> None:
    """One step back; what fails is said, and the other steps back are still made."""
    try:
        lvm.run(*argv)
    except (DevmapperError, OSError) as err:
        log.warning("undoing: %s", err)
