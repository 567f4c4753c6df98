"""LVM's programs (Debian: lvm2), and what they say about a volume group or a thin pool.

Every call reads LVM's state anew; nothing is remembered.  Where no udevd runs (a container, a
rescue system) LVM is told so, or it would look for its devices in udev's empty database and wait
for nodes that nobody makes.
"""

import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

from devmapper.errors import ToolError
from devmapper.linux import process
from devmapper.linux.process import CompletedRun

TOOLS: Final = (
    "pvcreate",
    "pvremove",
    "vgcreate",
    "vgchange",
    "vgremove",
    "lvcreate",
    "lvconvert",
    "lvchange",
)

_UDEV_CONTROL: Final = Path("/run/udev/control")
_WITHOUT_UDEV: Final = (
    'devices { obtain_device_list_from_udev=0 external_device_info_source="none" }'
    " activation { udev_sync=0 udev_rules=0 verify_udev_operations=1 }"
)
_SINGLE_HYPHEN: Final = re.compile(r"(?<!-)-(?!-)")
_NO_SUCH_OBJECT: Final = 5  # ECMD_FAILED of LVM's commands
_TIMEOUT_SECONDS: Final = 120.0


class VolumeGroup(NamedTuple):
    """One volume group: its tags and the devices it stands on."""

    name: str
    tags: frozenset[str]
    devices: tuple[Path, ...]


def run(*argv: str) -> CompletedRun:
    """Run one of LVM's commands; `ToolError` if it fails, `EnvironmentLacking` without lvm2."""
    config = () if _UDEV_CONTROL.exists() else ("--config", _WITHOUT_UDEV)
    return process.run([argv[0], *config, *argv[1:]], timeout=_TIMEOUT_SECONDS)


def find_volume_group(name: str) -> VolumeGroup | None:
    """The volume group *name*, None if LVM knows none."""
    try:
        rows = _report("vgs", "-o", "vg_name,vg_tags,pv_name", name)
    except ToolError as err:
        if err.status == _NO_SUCH_OBJECT:
            return None
        raise
    if not rows:
        return None
    tags = frozenset(filter(None, rows[0]["vg_tags"].split(",")))
    return VolumeGroup(name, tags, tuple(Path(row["pv_name"]) for row in rows))


def volume_of(dm_name: str) -> tuple[str, str] | None:
    """Volume group and logical volume behind a device-mapper name, None if it is not LVM's form.

    LVM joins the two by a hyphen, doubles those inside of them, and adds `-tpool` to the hidden
    device of a thin pool that has thin volumes.
    """
    parts = _SINGLE_HYPHEN.split(dm_name)
    if len(parts) == 3 and parts[2] == "tpool":
        parts.pop()
    if len(parts) != 2:
        return None
    group, volume = (part.replace("--", "-") for part in parts)
    return group, volume


def transaction_id(group: str, volume: str) -> int:
    """The transaction id that LVM's metadata have for a thin pool; 0: LVM never made a volume.

    LVM never validates 0, so that somebody else may own the pool's id; with any other it refuses
    to activate a pool whose id it did not move itself.
    """
    rows = _report("lvs", "-o", "transaction_id", f"{group}/{volume}")
    return int(rows[0]["transaction_id"] or 0)


def _report(*argv: str) -> list[dict[str, Any]]:
    done = run(*argv, "--reportformat", "json")
    (report,) = json.loads(done.stdout)["report"]
    (rows,) = report.values()
    return list(rows)
