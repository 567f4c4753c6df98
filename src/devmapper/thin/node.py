"""B-tree nodes in memory: keys and values as typed arrays, decoded from a block and back.

A node may hold more than its limit while an operation of `devmapper.thin.btree` is under way; it
never gets packed like that.
"""

from array import array
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self

from devmapper.errors import FormatError
from devmapper.thin import checksum
from devmapper.thin import format as layout

# `int` or `bytes` values, by the tree that the node belongs to; `Btree` gives them their type back.
Values = Any


def _split_bytes(size: int) -> Callable[[bytes], list[bytes]]:
    return lambda raw: [raw[at : at + size] for at in range(0, len(raw), size)]


class ValueType(NamedTuple):
    """How the values of a tree are kept in memory and packed."""

    size: int
    unpack: Callable[[bytes], Values]
    pack: Callable[[Values], bytes]


U64: Final = ValueType(layout.U64_SIZE, layout.unpack_u64s, layout.pack_u64s)
REF_COUNT: Final = ValueType(layout.REF_COUNT_SIZE, layout.unpack_u32s, layout.pack_u32s)
INDEX_ENTRY: Final = ValueType(
    layout.INDEX_ENTRY_SIZE, _split_bytes(layout.INDEX_ENTRY_SIZE), b"".join
)
DEVICE_DETAILS: Final = ValueType(
    layout.DEVICE_DETAILS_SIZE, _split_bytes(layout.DEVICE_DETAILS_SIZE), b"".join
)


class Node:
    """One node; *values* are block numbers in an internal node."""

    __slots__ = ("block", "keys", "leaf", "limit", "value_type", "values")

    def __init__(
        self,
        block: int,
        value_type: ValueType,
        keys: "array[int]",
        values: Values,
        *,
        leaf: bool,
        limit: int | None = None,
    ) -> None:
        self.block = block
        self.value_type = value_type
        self.keys = keys
        self.values = values
        self.leaf = leaf
        self.limit = layout.max_entries(value_type.size) if limit is None else limit

    @classmethod
    def empty(cls, value_type: ValueType, *, leaf: bool) -> Self:
        """A new node that has no block yet."""
        return cls(-1, value_type, array("Q"), value_type.unpack(b""), leaf=leaf)

    @classmethod
    def unpack(cls, raw: bytes, block: int, value_type: ValueType) -> Self:
        """Decode and check a block; *value_type* is that of the tree's leaves."""
        checksum.check_block(raw, layout.BTREE_NODE, block)
        header = layout.NodeHeader.unpack(raw)
        header.check(block)
        if not header.is_leaf:
            value_type = U64
            if not header.nr_entries:
                raise FormatError(block, "nr_entries", want="at least 1", got=0)
        elif header.value_size != value_type.size:
            raise FormatError(block, "value_size", want=value_type.size, got=header.value_size)
        return cls(
            block,
            value_type,
            layout.node_keys(header, raw),
            value_type.unpack(layout.node_values(header, raw)),
            leaf=header.is_leaf,
            limit=header.max_entries,
        )

    def pack(self) -> bytes:
        """The sealed block."""
        flags = layout.NodeFlags.LEAF if self.leaf else layout.NodeFlags.INTERNAL
        size = self.value_type.size
        header = layout.NodeHeader(0, flags, self.block, len(self.keys), self.limit, size, 0)
        raw = layout.pack_node(
            header, layout.pack_u64s(self.keys), self.value_type.pack(self.values)
        )
        return checksum.seal(raw, layout.BTREE_NODE)

    def copy(self) -> Self:
        return type(self)(
            self.block,
            self.value_type,
            self.keys[:],
            self.values[:],
            leaf=self.leaf,
            limit=self.limit,
        )
