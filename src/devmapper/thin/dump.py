"""Pool metadata as XML text: what `thin_dump` prints and `thin_restore` reads.

The text equals that of thin-provisioning-tools 0.9 byte for byte.  No I/O besides reading blocks.
"""

from collections.abc import Collection, Iterator
from typing import Final

from devmapper.errors import FormatError
from devmapper.thin.format import (
    SUPERBLOCK_LOCATION,
    DeviceDetails,
    Superblock,
    pack_mapping,
    unpack_mapping,
)
from devmapper.thin.walk import (
    MAPPINGS,
    BlockReader,
    leaves,
    nr_data_blocks,
    open_superblock,
    read_details,
    read_mapping_roots,
)

_NEXT_BLOCK: Final = pack_mapping(1, 0)


def dump(
    device: BlockReader, *, metadata_snap: bool = False, dev_ids: Collection[int] | None = None
) -> Iterator[str]:
    """Yield the XML in pieces of whole lines; all thin devices, or those in *dev_ids*.

    Metadata that is damaged raises `IntegrityError` where the damage is met: what was yielded until
    then is good, but not all there is.
    """
    superblock = open_superblock(device, metadata_snap=metadata_snap)
    details = read_details(device, superblock)
    yield _superblock_tag(device, superblock)
    for thin_id, root in read_mapping_roots(device, superblock).items():
        if dev_ids is not None and thin_id not in dev_ids:
            continue
        if thin_id not in details:
            field = f"device details of thin id {thin_id}"
            raise FormatError(superblock.device_details_root, field, want="present", got="absent")
        yield _device_tag(thin_id, details[thin_id])
        yield from _mapping_tags(device, root)
        yield "  </device>\n"
    yield "</superblock>\n"


def _superblock_tag(device: BlockReader, superblock: Superblock) -> str:
    # A metadata snap carries no space maps, so it does not know the size of the pool.
    in_place = superblock.blocknr == SUPERBLOCK_LOCATION
    nr_blocks = nr_data_blocks(device, superblock) if in_place else 0
    return (
        f'<superblock uuid="" time="{superblock.time}" transaction="{superblock.trans_id}"'
        f' flags="{superblock.flags}" version="{superblock.version}"'
        f' data_block_size="{superblock.data_block_size}" nr_data_blocks="{nr_blocks}">\n'
    )


def _device_tag(thin_id: int, details: DeviceDetails) -> str:
    return (
        f'  <device dev_id="{thin_id}" mapped_blocks="{details.mapped_blocks}"'
        f' transaction="{details.transaction_id}" creation_time="{details.creation_time}"'
        f' snap_time="{details.snapshotted_time}">\n'
    )


def _mapping_tags(device: BlockReader, root: int) -> Iterator[str]:
    """One piece of text per leaf; a run that goes on in the next leaf is kept for it."""
    begin = key = value = 0
    for leaf in leaves(device, root, MAPPINGS):
        lines = []
        for found_key, found in zip(leaf.keys, leaf.u64_values(), strict=True):
            if found_key == key and found == value:
                key += 1
                value += _NEXT_BLOCK
                continue
            if key != begin:
                lines.append(_run_tag(begin, key - begin, value))
            begin, key, value = found_key, found_key + 1, found + _NEXT_BLOCK
        yield "".join(lines)
    if key != begin:
        yield _run_tag(begin, key - begin, value)


def _run_tag(begin: int, length: int, end_value: int) -> str:
    data_block, time = unpack_mapping(end_value - length * _NEXT_BLOCK)
    if length == 1:
        return (
            f'    <single_mapping origin_block="{begin}" data_block="{data_block}"'
            f' time="{time}"/>\n'
        )
    return (
        f'    <range_mapping origin_begin="{begin}" data_begin="{data_block}"'
        f' length="{length}" time="{time}"/>\n'
    )
