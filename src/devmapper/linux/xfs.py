"""Knobs of a mounted xfs in sysfs (Documentation/admin-guide/xfs.rst, "Error handling")."""

import errno
from pathlib import Path

from devmapper.linux.blockdev import device_number


def kernel_name(device: Path) -> str:
    """How the kernel calls a block device in its log and in sysfs: `loop3`, `dm-3`."""
    return Path(f"/sys/dev/block/{device_number(device)}").resolve(strict=True).name


def set_enospc_retries(device: Path, retries: int) -> None:
    """How often the xfs on *device* tries metadata again that found no space; 0: it shuts down.

    ENOTSUP if the kernel has no such knob for it.
    """
    knob = Path("/sys/fs/xfs", kernel_name(device), "error/metadata/ENOSPC/max_retries")
    try:
        knob.write_text(str(retries), encoding="ascii")
    except FileNotFoundError as err:
        message = "this kernel cannot limit the retries of xfs"
        raise OSError(errno.ENOTSUP, message, str(knob)) from err
