"""Which thin devices there are: the top mapping tree and the device details tree.

What changes often stays in memory until `flush`: details, and the roots of the bottom trees that
this transaction changes.  Not thread-safe.
"""

from array import array
from typing import Final

from devmapper.errors import ThinIdMissing
from devmapper.thin.btree import Btree
from devmapper.thin.format import DeviceDetails
from devmapper.thin.node import DEVICE_DETAILS, U64
from devmapper.thin.references import DataBlocks, Subtrees
from devmapper.thin.space_map import DataSpaceMap
from devmapper.thin.transaction_manager import TransactionManager

_KNOWN_ROOTS: Final = 4096  # roots of mapping trees remembered for lookups


class ThinDevices:
    """Both trees as one thing; `mapping_root` and `details_root` are current after `flush`."""

    def __init__(
        self, tm: TransactionManager, data: DataSpaceMap, mapping_root: int, details_root: int
    ) -> None:
        self._tm = tm
        self.mappings = Btree[int](tm, U64, DataBlocks(data))  # the bottom trees
        self._top = Btree[int](tm, U64, Subtrees(tm, self.mappings))
        self._details_tree = Btree[bytes](tm, DEVICE_DETAILS)
        self.mapping_root = mapping_root
        self.details_root = details_root
        self._details: dict[int, DeviceDetails] = {}  # not in the tree yet
        self._roots: dict[int, int] = {}  # known for lookups
        self._owned: set[int] = set()  # whose root is ours to change in this transaction

    @classmethod
    def create(cls, tm: TransactionManager, data: DataSpaceMap) -> "ThinDevices":
        """Make the trees of an empty pool."""
        self = cls(tm, data, 0, 0)
        self.mapping_root = self._top.create()
        self.details_root = self._details_tree.create()
        return self

    @property
    def nr_unflushed(self) -> int:
        return len(self._details) + len(self._owned)

    def ids(self) -> set[int]:
        known = set(self._details)
        for keys, _ in self._details_tree.leaves(self.details_root):
            known.update(keys)
        return known

    def find_details(self, thin_id: int) -> DeviceDetails | None:
        details = self._details.get(thin_id)
        if details is None:
            raw = self._details_tree.lookup(self.details_root, thin_id)
            details = None if raw is None else DeviceDetails.unpack(raw)
        return details

    def set_details(self, thin_id: int, details: DeviceDetails) -> None:
        self._details[thin_id] = details

    def root(self, thin_id: int) -> int:
        """Root of the bottom tree, for looking."""
        root = self._roots.get(thin_id)
        if root is None:
            root = self._top.lookup(self.mapping_root, thin_id)
            if root is None:
                raise ThinIdMissing(thin_id)
            if len(self._roots) > _KNOWN_ROOTS:
                self._roots = {owned: self._roots[owned] for owned in self._owned}
            self._roots[thin_id] = root
        return root

    def own_root(self, thin_id: int) -> int:
        """Root of the bottom tree, which is about to change; `set_root` has to follow.

        The path to it is unshared first: while a metadata snap shares a node of the top tree, the
        bottom trees below it have one reference too few for the eyes of `shadow`.
        """
        if thin_id not in self._owned:
            self.mapping_root = self._top.own_path(self.mapping_root, thin_id)
            self.root(thin_id)
            self._owned.add(thin_id)
        return self._roots[thin_id]

    def set_root(self, thin_id: int, root: int) -> None:
        self._roots[thin_id] = root

    def add(self, thin_id: int, root: int, details: DeviceDetails) -> None:
        """List a new thin device, which takes over a reference to *root*."""
        self.mapping_root = self._top.insert(self.mapping_root, thin_id, root).root
        self._roots[thin_id] = root
        self._details[thin_id] = details

    def share_root(self, thin_id: int) -> int:
        """Root of the bottom tree with one reference more, for a snapshot."""
        root = self.root(thin_id)
        self._tm.counts.inc(root)
        self._write_root(thin_id)
        return root

    def delete(self, thin_id: int) -> None:
        self._write_root(thin_id)
        self._write_details()
        # The top tree lets go of the bottom root itself, after the path to it is unshared.
        self.mapping_root = self._top.remove_range(self.mapping_root, thin_id, thin_id + 1).root
        self.details_root = self._details_tree.remove_range(
            self.details_root, thin_id, thin_id + 1
        ).root
        self._roots.pop(thin_id, None)

    def delete_trees(self, mapping_root: int, details_root: int) -> None:
        """Let go of other trees of both kinds: those of a metadata snap."""
        self._top.delete(mapping_root)
        self._details_tree.delete(details_root)

    def flush(self) -> None:
        """Put what is in memory into the trees."""
        self._write_details()
        ids = sorted(self._owned)
        roots = array("Q", [self._roots[thin_id] for thin_id in ids])
        self.mapping_root = self._top.insert_many(self.mapping_root, ids, roots).root

    def committed(self) -> None:
        """The transaction is durable: no root is ours to change any more."""
        self._owned.clear()

    def _write_root(self, thin_id: int) -> None:
        if thin_id in self._owned:
            self._owned.remove(thin_id)
            root = self._roots[thin_id]
            self.mapping_root = self._top.insert(self.mapping_root, thin_id, root).root

    def _write_details(self) -> None:
        ids = sorted(self._details)
        packed = [self._details[thin_id].pack() for thin_id in ids]
        self.details_root = self._details_tree.insert_many(self.details_root, ids, packed).root
        self._details.clear()
