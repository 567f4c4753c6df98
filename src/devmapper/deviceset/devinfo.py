"""A layer's device as the seed's API shows it."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from devmapper.deviceset.names import GraphNames, LayerId
from devmapper.deviceset.records import LayerRecord


class DevInfo(NamedTuple):
    """A layer's record; moby `deviceset.go` devInfo.

    *hash* is the layer's id, "" for the base layer; *device_id* its thin id, 24 bits; *size* in
    bytes; *initialized* is true for a formatted base layer only.
    """

    hash: str
    device_id: int
    size: int
    transaction_id: int
    initialized: bool
    deleted: bool
    device: str

    @classmethod
    def of(cls, layer: LayerId, record: LayerRecord, names: GraphNames) -> Self:
        return cls(
            layer,
            record.thin_id,
            record.size,
            record.transaction_id,
            record.initialized,
            record.deleted,
            names.device(layer),
        )

    def name(self) -> str:
        """Name of the device, such as `docker-8:1-42-base`; moby devInfo.Name."""
        return self.device

    def dev_name(self) -> str:
        """Where the kernel's device mapper has its node; moby devInfo.DevName.

        The embedded engine uses a loop device instead, which is found by `DeviceSet.device_path`.
        """
        return f"/dev/mapper/{self.device}"


class MetaData(NamedTuple):
    """The seed's `MetaData`: every layer that has a record, by its id."""

    devices: Mapping[str, DevInfo]
