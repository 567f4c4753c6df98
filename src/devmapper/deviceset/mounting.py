"""One mount of one layer: options, label, retries of xfs, and why the kernel refuses."""

import logging
import re
from pathlib import Path
from typing import Final

from devmapper.deviceset.mountopts import mount_options
from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.options import Options
from devmapper.errors import LayerBusy, MountFailed
from devmapper.linux import blockdev, mount, xfs
from devmapper.linux.kmsg import kernel_log

log = logging.getLogger(__name__)

_FILE_SYSTEMS: Final = Path("/proc/filesystems")
# How SELinux shows it in mountinfo: in quotes where it has a comma
_CONTEXT: Final = re.compile(r'(?:^|,)context=(?:"([^"]*)"|([^,]*))')


def mount_layer(layer: LayerId, device: Path, path: Path, options: Options, label: str) -> None:
    """Mount the file system on *device* at *path*, or leave everything unmounted.

    `MountFailed` says what the system call said, and what the kernel's log said meanwhile (moby
    adds the end of dmesg, whatever it is about).
    """
    if mount.is_mount_root(path):
        raise LayerBusy(file_name(layer), [f"another mount at {str(path)!r}"])
    fs_type = ""
    with kernel_log() as said:
        try:
            fs_type = blockdev.probe_fs_type(device)
            chosen = mount_options(fs_type, options.mount_options, label)
            mount.mount(device, path, fs_type, flags=chosen.flags, data=chosen.data)
        except OSError as err:
            reason = err.strerror or str(err)
            sources = [fs_type, "selinux"] if label else [fs_type]
            if kernel := said.about(_kernel_name(device), *filter(None, sources)):
                reason = f"{reason} ({kernel})"
            raise MountFailed(file_name(layer), path, reason, hint=_label_hint(label)) from err
    if fs_type == "xfs" and options.xfs_nospace_max_retries is not None:
        _limit_retries(layer, device, path, options.xfs_nospace_max_retries)


def mention_label(layer: LayerId, path: Path, label: str) -> None:
    """Say that a layer which is mounted already keeps the label it was mounted with.

    moby says nothing.  A mount has one label for all of its users.
    """
    if not label:
        return
    entries = [entry for entry in mount.mountinfo() if entry.mount_point == path]
    found = label_of(entries[-1].super_options) if entries else ""
    if entries and found != label:
        log.warning(
            "layer %r is mounted already, with %s: label %r has no effect",
            file_name(layer),
            f"label {found!r}" if found else "no label",
            label,
        )


def label_of(super_options: str) -> str:
    """The label that a mount was given with `context=`, "" for none."""
    found = _CONTEXT.search(super_options)
    return (found[1] or found[2] or "") if found else ""


def _limit_retries(layer: LayerId, device: Path, path: Path, retries: int) -> None:
    try:
        xfs.set_enospc_retries(device, retries)
    except OSError as err:
        reason = f"dm.xfs_nospace_max_retries={retries}: {err.strerror or err}"
        failed = MountFailed(file_name(layer), path, reason, hint="leave the option out")
        try:
            mount.unmount(path)
        except OSError as other:
            failed.add_note(f"it stays mounted: {other.strerror}")
        raise failed from err


def _kernel_name(device: Path) -> str:
    try:
        return xfs.kernel_name(device)
    except OSError:
        return device.name


def _label_hint(label: str) -> str:
    if not label:
        return ""
    try:
        known = _FILE_SYSTEMS.read_text(encoding="ascii").split()
    except OSError:
        return ""
    return "" if "selinuxfs" in known else "this kernel has no SELinux: give no mount label"
