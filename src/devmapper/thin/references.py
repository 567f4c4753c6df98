"""What the values of mapping trees refer to, for the shadowing of their leaves."""

from devmapper.thin.btree import Btree
from devmapper.thin.format import data_blocks
from devmapper.thin.node import Values
from devmapper.thin.space_map import DataSpaceMap
from devmapper.thin.transaction_manager import TransactionManager


class DataBlocks:
    """References from a bottom mapping tree to data blocks."""

    def __init__(self, space_map: DataSpaceMap) -> None:
        self._space_map = space_map

    def inc(self, values: Values) -> None:
        self._space_map.inc_many(data_blocks(values))

    def dec(self, values: Values) -> None:
        self._space_map.dec_many(data_blocks(values))

    def replace(self, old: Values, new: Values) -> None:
        # The time alone may differ; then the block keeps its reference (`data_block_equal`).
        pairs = zip(data_blocks(old), data_blocks(new), strict=True)
        self._space_map.dec_many([was for was, now in pairs if was != now])


class Subtrees:
    """References from the top mapping tree to bottom ones."""

    def __init__(self, tm: TransactionManager, mappings: Btree[int]) -> None:
        self._tm = tm
        self._mappings = mappings

    def inc(self, values: Values) -> None:
        self._tm.counts.inc_many(values)

    def dec(self, values: Values) -> None:
        for root in values:
            self._mappings.delete(root)

    def replace(self, old: Values, new: Values) -> None:
        """Whoever changes a bottom tree has already let go of its old root."""
