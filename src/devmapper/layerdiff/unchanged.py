"""Which inodes two trees certainly have in common: those whose place on the device is shared.

The argument why equal bytes of an inode mean an equal inode stands in docs/internals/layer-diff.md.
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from devmapper.layerdiff.ext4_inodes import Ext4Inodes, read_ext4
from devmapper.layerdiff.inode_ranges import ByteRange, InodeRange, InodeSet
from devmapper.layerdiff.xfs_inodes import XfsInodes, read_xfs
from devmapper.linux import blockdev, mount

log = logging.getLogger(__name__)


class MountedTree(NamedTuple):
    """A directory of a mounted file system, and the device that it is on."""

    root: Path
    device: Path


def changed_inodes(
    new: MountedTree, old: MountedTree, changed: Iterable[ByteRange]
) -> InodeSet | None:
    """Every inode that may not be the same in both; all others are.

    *changed* are the bytes in which the two devices may differ, at a moment since which
    each file system was on its device whole.  None where that does not tell: a file system or a
    feature of it that is not known here, two that are not built alike, or another mount inside of
    one of the trees, whose inodes have numbers of their own.
    """
    try:
        if not (_is_plain(new) and _is_plain(old)):
            log.debug("%s: something else is mounted there or inside of it", new.root)
            return None
        ours, theirs = _read(new.device), _read(old.device)
    except OSError as err:
        log.debug("%s: %s", new.root, err)
        return None
    differing = _differing(ours, theirs)
    if ours is None or differing is None:
        log.debug("%s: its file system does not tell where inodes are", new.root)
        return None
    return InodeSet([*differing, *ours.inodes_in(changed)])


def _differing(
    ours: Ext4Inodes | XfsInodes | None, theirs: Ext4Inodes | XfsInodes | None
) -> list[InodeRange] | None:
    if isinstance(ours, Ext4Inodes) and isinstance(theirs, Ext4Inodes):
        return ours.differing(theirs)
    if isinstance(ours, XfsInodes) and isinstance(theirs, XfsInodes):
        return ours.differing(theirs)
    return None


def _read(device: Path) -> Ext4Inodes | XfsInodes | None:
    fs_type = blockdev.probe_fs_type(device)
    with open(device, "rb") as file:
        if fs_type == "ext4":
            return read_ext4(file)
        return read_xfs(file) if fs_type == "xfs" else None


def _is_plain(tree: MountedTree) -> bool:
    """Whether all of the tree is in the file system on its device."""
    number = blockdev.device_number(tree.device)
    found = os.stat(tree.root).st_dev
    if (os.major(found), os.minor(found)) != (number.major, number.minor):
        return False
    below = os.path.realpath(tree.root) + "/"
    return not any(str(entry.mount_point).startswith(below) for entry in mount.mountinfo())
