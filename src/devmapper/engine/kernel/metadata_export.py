"""A consistent copy of an active pool's metadata, while the pool goes on."""

import os
from pathlib import Path

from devmapper.engine.kernel.metadata_device import DirectDevice
from devmapper.linux.files import sync_directory
from devmapper.thin.blocks import FileDevice
from devmapper.thin.copy import copy_pool
from devmapper.thin.format import BLOCK_SIZE, Superblock


def export(device: DirectDevice, superblock: Superblock, target: Path) -> None:
    """Make *target* a file of the device's size with the trees of *superblock*, durably."""
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, device.nr_blocks * BLOCK_SIZE)
        copy_pool(device, superblock, FileDevice(fd, target, read_only=False))
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(target.absolute().parent)
