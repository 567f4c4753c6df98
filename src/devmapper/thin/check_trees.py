"""Checking B-trees that share nodes: each node is read once, however many parents it has.

What a node says of itself and of everything below it is kept, so that another parent costs one
look-up.  Every reference found is counted, which is what the space maps are compared with.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from devmapper.errors import IntegrityError
from devmapper.thin.damage import DamageKind, DamageLog
from devmapper.thin.format import MAX_BTREE_DEPTH
from devmapper.thin.ref_counts import RefCounts
from devmapper.thin.walk import (
    ALL_KEYS,
    BlockReader,
    Node,
    Subtree,
    Tree,
    check_key_range,
    read_node,
    subtrees,
)


class Summary(NamedTuple):
    """A subtree in short; *damages* are numbers in the log, of the subtree and what is below."""

    entries: int = 0  # in its leaves
    height: int = 0
    span: tuple[int, int] | None = None  # its own first and last key
    underfull: bool = False
    damages: tuple[int, ...] = ()


_IN_PROGRESS: Final = Summary(height=-1)


class TreeChecker:
    """Walks the trees of one kind; their nodes may be shared between them.

    *claims* says to which kind of tree each node read so far belongs, over all checkers.
    *on_leaf* is called once per leaf and returns what it finds damaged in the values.
    """

    def __init__(
        self,
        device: BlockReader,
        tree: Tree,
        *,
        log: DamageLog,
        counts: RefCounts,
        claims: dict[int, Tree],
        kind: DamageKind = DamageKind.NODE,
        on_leaf: Callable[[Node], tuple[int, ...]] | None = None,
    ) -> None:
        self._device = device
        self._tree = tree
        self._log = log
        self._counts = counts
        self._claims = claims
        self._kind = kind
        self._on_leaf = on_leaf
        self._known: dict[int, Summary] = {}
        self.incomplete = False  # a part could not be read, so references in it are not counted

    def check(self, root: int) -> Summary:
        """Check the tree below *root* and count one reference to it."""
        return self._visit(Subtree(root, ALL_KEYS), depth=0)

    def _visit(self, place: Subtree, *, depth: int) -> Summary:
        if place.block < self._device.nr_blocks:
            self._counts.increment((place.block,))
        summary = self._known.get(place.block)
        if summary is None:
            self._known[place.block] = _IN_PROGRESS
            summary = self._known[place.block] = self._first_visit(place, depth=depth)
        elif summary is _IN_PROGRESS:
            return self._unreadable(place, "the node is reached from below itself")
        return self._fitted(summary, place, is_root=depth == 0)

    def _first_visit(self, place: Subtree, *, depth: int) -> Summary:
        owner = self._claims.setdefault(place.block, self._tree)
        if owner != self._tree:
            return self._unreadable(place, f"the node already belongs to the {owner.name}")
        if depth >= MAX_BTREE_DEPTH:
            return self._unreadable(place, f"the tree is more than {MAX_BTREE_DEPTH} nodes deep")
        try:
            node = read_node(self._device, place.block, self._tree)
        except (IntegrityError, OSError) as err:
            return self._unreadable(place, str(err))
        span = (node.keys[0], node.keys[-1]) if node.keys else None
        if node.is_leaf:
            found = self._on_leaf(node) if self._on_leaf else ()
            return Summary(len(node.keys), 0, span, node.is_underfull, found)
        return self._summed_up(place, node, depth=depth)

    def _summed_up(self, place: Subtree, node: Node, *, depth: int) -> Summary:
        first, last = node.keys[0], node.keys[-1]
        entries = 0
        heights = set()
        damages: set[int] = set()
        for child in subtrees(node, place.keys):
            below = self._visit(child, depth=depth + 1)
            entries += below.entries
            if below.span:
                last = max(last, below.span[1])
                heights.add(below.height)
            damages.update(below.damages)
        if len(heights) > 1 and not damages:
            damages.update(self._damaged(place, "its leaves are not equally deep").damages)
        height = 1 + max(heights, default=0)
        return Summary(entries, height, (first, last), node.is_underfull, tuple(sorted(damages)))

    def _fitted(self, summary: Summary, place: Subtree, *, is_root: bool) -> Summary:
        """The summary, with what is wrong about the node at this very place added."""
        wrong = ""
        if not is_root and not summary.damages and summary.underfull:
            wrong = f"holds {summary.entries} entries, too few for a node that is not a root"
            if summary.height:
                wrong = "holds too few entries for a node that is not a root"
        elif summary.span:
            try:
                check_key_range(place.block, *summary.span, place.keys)
            except IntegrityError as err:
                wrong = str(err)
        if not wrong:
            return summary
        damages = (*summary.damages, *self._damaged(place, wrong).damages)
        return summary._replace(damages=damages)

    def _unreadable(self, place: Subtree, what: str) -> Summary:
        self.incomplete = True
        return self._damaged(place, what)

    def _damaged(self, place: Subtree, what: str) -> Summary:
        where = f"metadata block {place.block}"
        told = what if what.startswith(where) else f"{where}: {what}"
        message = f"{self._tree.name}: {told}"
        return Summary(damages=(self._log.add(self._kind, place.block, message, keys=place.keys),))
