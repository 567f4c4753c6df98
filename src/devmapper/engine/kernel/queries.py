"""The questions that a pool's metadata answer, for `metadata_snap.ask`."""

from devmapper.engine.kernel.metadata_device import DirectDevice
from devmapper.engine.port import ThinStatus
from devmapper.errors import FormatError, ThinIdMissing
from devmapper.thin.format import DeviceDetails, Superblock, unpack_u64s
from devmapper.thin.walk import DETAILS, DEVICES, MAPPINGS, highest_key, leaves, lookup
from devmapper.units import ThinId


def thin_ids(device: DirectDevice, superblock: Superblock) -> list[ThinId]:
    """All thin ids, ascending; reads the device details tree only."""
    return [
        ThinId(key)
        for leaf in leaves(device, superblock.device_details_root, DETAILS)
        for key in leaf.keys
    ]


def thin_status(device: DirectDevice, superblock: Superblock, thin_id: ThinId) -> ThinStatus:
    """One thin device; reads one path of three trees.  `ThinIdMissing` if there is none."""
    raw = lookup(device, superblock.device_details_root, thin_id, DETAILS)
    if raw is None:
        raise ThinIdMissing(thin_id)
    details = DeviceDetails.unpack(raw)
    root = lookup(device, superblock.data_mapping_root, thin_id, DEVICES)
    if root is None:
        where = superblock.data_mapping_root
        raise FormatError(where, f"entry of thin id {thin_id}", want="present", got="absent")
    return ThinStatus(
        thin_id,
        details.mapped_blocks,
        highest_key(device, unpack_u64s(root)[0], MAPPINGS),
        details.transaction_id,
        details.creation_time,
        details.snapshotted_time,
    )
