"""Which file system is on a device: its kind and its UUID."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.linux.blockdev import probe_fs_type

# Where the superblock of each keeps its 16 bytes: ext4 at 1024 + 0x68, xfs at 32
_UUID_OFFSETS: Final[Mapping[str, int]] = {"ext4": 0x468, "xfs": 32}


class FsIdentity(NamedTuple):
    fs_type: str
    uuid: str  # as blkid spells it; "" where we do not know where it stands


def identify(device: Path) -> FsIdentity:
    """Read kind and UUID from *device*; EINVAL if there is no file system that we know."""
    fs_type = probe_fs_type(device)
    offset = _UUID_OFFSETS.get(fs_type)
    if offset is None:
        return FsIdentity(fs_type, "")
    with open(device, "rb", buffering=0) as file:
        file.seek(offset)
        raw = file.read(16)
    digits = raw.hex()
    cuts = (0, 8, 12, 16, 20, 32)
    return FsIdentity(fs_type, "-".join(digits[a:b] for a, b in pairwise(cuts)))
