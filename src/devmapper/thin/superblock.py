"""The superblock as the gate to a pool: what must hold before anything else is read."""

from devmapper.errors import FormatError
from devmapper.thin import checksum
from devmapper.thin import format as layout
from devmapper.thin.blocks import MetadataDevice
from devmapper.thin.format import Superblock
from devmapper.units import Bytes, TransactionId, sectors


def is_blank(device: MetadataDevice) -> bool:
    """Whether there is no pool yet: the first block holds nothing but zeros, as in the kernel."""
    return device.nr_blocks > 0 and device.read(layout.SUPERBLOCK_LOCATION) == layout.ZERO_BLOCK


def read_superblock(device: MetadataDevice) -> Superblock:
    """The superblock, checked as far as it can be without reading on."""
    location = layout.SUPERBLOCK_LOCATION
    raw = device.read(location)
    superblock = Superblock.unpack(raw)
    if superblock.magic != layout.MAGIC:
        raise FormatError(location, "magic", want=layout.MAGIC, got=superblock.magic)
    checksum.check_block(raw, layout.SUPERBLOCK, location)
    if not layout.MIN_VERSION <= superblock.version <= layout.VERSION:
        raise FormatError(location, "version", want=layout.VERSION, got=superblock.version)
    if superblock.incompat_flags & ~layout.INCOMPAT_SUPPORTED:
        raise FormatError(
            location,
            "incompat_flags",
            want=layout.INCOMPAT_SUPPORTED,
            got=superblock.incompat_flags,
        )
    if superblock.metadata_block_size != layout.BLOCK_SECTORS:
        raise FormatError(
            location,
            "metadata_block_size",
            want=layout.BLOCK_SECTORS,
            got=superblock.metadata_block_size,
        )
    return superblock


def new_superblock(
    *,
    data_block_size: Bytes,
    metadata_nr_blocks: int,
    data_mapping_root: int,
    device_details_root: int,
) -> Superblock:
    """That of an empty pool, its space maps still to be filled in."""
    unused = bytes(layout.SPACE_MAP_ROOT_SIZE)
    return Superblock(
        csum=0,
        flags=0,
        blocknr=layout.SUPERBLOCK_LOCATION,
        uuid=bytes(layout.UUID_SIZE),
        magic=layout.MAGIC,
        version=layout.VERSION,
        time=0,
        trans_id=TransactionId(0),
        held_root=0,
        data_space_map_root=unused,
        metadata_space_map_root=unused,
        data_mapping_root=data_mapping_root,
        device_details_root=device_details_root,
        data_block_size=sectors(data_block_size),
        metadata_block_size=sectors(Bytes(layout.BLOCK_SIZE)),
        metadata_nr_blocks=metadata_nr_blocks,
        compat_flags=0,
        compat_ro_flags=0,
        incompat_flags=0,
    )
