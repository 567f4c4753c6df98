"""Checking pool metadata without changing it: all that `thin_check` looks at, and some more.

`docs/internals/check.md` says what is checked and how a finding reads.
"""

from collections.abc import Callable
from typing import Final

from devmapper.errors import FormatError, IntegrityError
from devmapper.thin.check_space_maps import Comparison, SpaceMap, SpaceMapWalker
from devmapper.thin.check_trees import Summary, TreeChecker
from devmapper.thin.damage import CheckReport, Damage, DamageKind, DamageLog
from devmapper.thin.format import (
    SUPERBLOCK_LOCATION,
    DeviceDetails,
    SpaceMapRoot,
    Superblock,
)
from devmapper.thin.ref_counts import RefCounts
from devmapper.thin.walk import (
    DETAILS,
    DEVICES,
    MAPPINGS,
    BlockReader,
    Node,
    Tree,
    nr_data_blocks,
    open_superblock,
    read_details,
    read_mapping_roots,
    read_superblock,
)
from devmapper.units import MAX_THIN_ID

__all__ = ["CheckReport", "Damage", "DamageKind", "Progress", "check"]

Progress = Callable[[int, int], None]  # metadata blocks read, metadata blocks allocated
_PROGRESS_STEP: Final = 512


def check(
    device: BlockReader,
    *,
    metadata_snap: bool = False,
    skip_mappings: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Check the metadata on *device*; damage is reported, never raised.

    With *metadata_snap* only the trees of the held root are checked, which is safe while the pool
    is in use; `UsageError` where none is held.  With *skip_mappings* the mappings of the thin
    devices are not read and nothing is said about reference counts.
    """
    log = DamageLog()
    try:
        superblock = open_superblock(device, metadata_snap=metadata_snap)
    except (IntegrityError, OSError) as err:
        block = getattr(err, "block", SUPERBLOCK_LOCATION)
        log.add(DamageKind.SUPERBLOCK, block, f"superblock: {err}")
        return log.report()
    reader = _ReportingReader(device, superblock, progress) if progress else device
    run = _Check(reader, superblock, log, skip_mappings=skip_mappings)
    run.check_trees(superblock)
    if metadata_snap:
        return log.report(needs_check=superblock.needs_check)
    run.check_metadata_snap()
    return log.report(needs_check=superblock.needs_check, leaked=run.check_space_maps())


class _ReportingReader:
    """Tells how many blocks were read."""

    def __init__(self, device: BlockReader, superblock: Superblock, progress: Progress) -> None:
        self._device = device
        self._progress = progress
        self._total = SpaceMapRoot.unpack(superblock.metadata_space_map_root).nr_allocated
        self._done = 0

    @property
    def nr_blocks(self) -> int:
        return self._device.nr_blocks

    def read(self, block: int) -> bytes:
        self._done += 1
        if self._done % _PROGRESS_STEP == 0:
            self._progress(min(self._done, self._total), self._total)
        return self._device.read(block)


class _Check:
    """One check under way: what was found, and every reference counted so far."""

    def __init__(
        self,
        device: BlockReader,
        superblock: Superblock,
        log: DamageLog,
        *,
        skip_mappings: bool,
    ) -> None:
        self._device = device
        self._superblock = superblock
        self._log = log
        self._skip_mappings = skip_mappings
        self._metadata_counts = RefCounts()
        self._data_counts = RefCounts()
        self._claims: dict[int, Tree] = {}
        self._nr_data_blocks = self._find_nr_data_blocks()
        self._details = self._checker(DETAILS, DamageKind.DETAILS, self._on_details)
        self._devices = self._checker(DEVICES, DamageKind.MAPPING, self._on_devices)
        self._mappings = self._checker(MAPPINGS, DamageKind.MAPPING, self._on_mappings)
        self._summaries: dict[int, Summary] = {}  # by root of the mappings of a thin device
        self._snap_is_lost = False
        self._metadata_counts.increment((SUPERBLOCK_LOCATION,))
        self._check_size()

    def _checker(
        self, tree: Tree, kind: DamageKind, on_leaf: Callable[[Node], tuple[int, ...]]
    ) -> TreeChecker:
        return TreeChecker(
            self._device,
            tree,
            log=self._log,
            counts=self._metadata_counts,
            claims=self._claims,
            kind=kind,
            on_leaf=on_leaf,
        )

    def _find_nr_data_blocks(self) -> int:
        # A metadata snap carries no space maps: the size of the pool stands in the superblock.
        try:
            return nr_data_blocks(self._device, read_superblock(self._device))
        except (IntegrityError, OSError) as err:
            self._log.add(DamageKind.SUPERBLOCK, SUPERBLOCK_LOCATION, f"superblock: {err}")
            return self._device.nr_blocks

    def _check_size(self) -> None:
        stored = self._superblock.metadata_nr_blocks
        if stored > self._device.nr_blocks:
            want = f"at most {self._device.nr_blocks}, the size of the metadata device"
            error = FormatError(
                self._superblock.blocknr, "metadata_nr_blocks", want=want, got=stored
            )
            self._log.add(DamageKind.SUPERBLOCK, self._superblock.blocknr, str(error))

    def check_trees(self, superblock: Superblock) -> None:
        """Check what a superblock leads to, be it the one in place or the metadata snap's."""
        self._details.check(superblock.device_details_root)
        self._devices.check(superblock.data_mapping_root)
        try:
            details = read_details(self._device, superblock)
            roots = read_mapping_roots(self._device, superblock)
        except (IntegrityError, OSError):
            return  # noted above; thin ids that one of the trees lacks mean nothing now
        self._compare_devices(superblock, details, roots)

    def check_metadata_snap(self) -> None:
        """Check the trees of the held root, and count what they share with the pool's."""
        held = self._superblock.held_root
        if held == SUPERBLOCK_LOCATION:
            return
        if held < self._device.nr_blocks:
            self._metadata_counts.increment((held,))
        try:
            superblock = read_superblock(self._device, held)
        except (IntegrityError, OSError) as err:
            self._log.add(DamageKind.SUPERBLOCK, held, f"metadata snap: {err}")
            self._snap_is_lost = True
            return
        self.check_trees(superblock)

    def _compare_devices(
        self, superblock: Superblock, details: dict[int, DeviceDetails], roots: dict[int, int]
    ) -> None:
        """Both trees must name the same thin devices, and count their mappings alike."""
        for thin_id in sorted(details.keys() - roots.keys()):
            block = superblock.data_mapping_root
            self._lost(DamageKind.MAPPING, block, thin_id, "device details without mappings")
        for thin_id in sorted(roots.keys() - details.keys()):
            block = superblock.device_details_root
            self._lost(DamageKind.DETAILS, block, thin_id, "mappings without device details")
        for thin_id in sorted(roots.keys() & details.keys()):
            summary = self._summaries.get(roots[thin_id])
            stored = details[thin_id].mapped_blocks
            if summary and not summary.damages and stored != summary.entries:
                what = f"mapped_blocks is {stored}, expected {summary.entries}"
                block = superblock.device_details_root
                self._lost(DamageKind.DETAILS, block, thin_id, what)

    def _lost(self, kind: DamageKind, block: int, thin_id: int, what: str) -> None:
        message = f"metadata block {block}: {what}"
        self._log.note(Damage(kind, block, message, thin_ids=(thin_id,)))

    def _on_details(self, leaf: Node) -> tuple[int, ...]:
        return self._check_thin_ids(leaf, DamageKind.DETAILS)

    def _on_devices(self, leaf: Node) -> tuple[int, ...]:
        found = self._check_thin_ids(leaf, DamageKind.MAPPING)
        if not self._skip_mappings:
            for thin_id, root in zip(leaf.keys, leaf.u64_values(), strict=True):
                summary = self._summaries[root] = self._mappings.check(root)
                for number in summary.damages:
                    self._log.hurts(number, thin_id)
        return found

    def _check_thin_ids(self, leaf: Node, kind: DamageKind) -> tuple[int, ...]:
        if not leaf.keys or leaf.keys[-1] <= MAX_THIN_ID:
            return ()
        error = FormatError(leaf.block, "thin id", want=f"at most {MAX_THIN_ID}", got=leaf.keys[-1])
        return (self._log.add(kind, leaf.block, str(error)),)

    def _on_mappings(self, leaf: Node) -> tuple[int, ...]:
        blocks = leaf.data_blocks()
        if not blocks or max(blocks) < self._nr_data_blocks:
            self._data_counts.increment(blocks)
            return ()
        bad = next(block for block in blocks if block >= self._nr_data_blocks)
        self._data_counts.increment(block for block in blocks if block < self._nr_data_blocks)
        field = f"data block of mapping {leaf.keys[blocks.index(bad)]}"
        error = FormatError(leaf.block, field, want=f"less than {self._nr_data_blocks}", got=bad)
        return (self._log.add(DamageKind.MAPPING, leaf.block, str(error)),)

    def check_space_maps(self) -> tuple[int, int]:
        """Compare both space maps with the counted references; returns leaked data and metadata."""
        checkers = (self._details, self._devices, self._mappings)
        lost = self._snap_is_lost or any(checker.incomplete for checker in checkers)
        walker = SpaceMapWalker(
            self._device, log=self._log, counts=self._metadata_counts, claims=self._claims
        )
        data = walker.data(SpaceMapRoot.unpack(self._superblock.data_space_map_root))
        metadata = walker.metadata(SpaceMapRoot.unpack(self._superblock.metadata_space_map_root))
        return (
            self._compare(data, self._data_counts, complete=not lost),
            self._compare(
                metadata, self._metadata_counts, complete=not (lost or walker.incomplete)
            ),
        )

    def _compare(self, space_map: SpaceMap | None, counts: RefCounts, *, complete: bool) -> int:
        if space_map is None:
            return 0
        return Comparison(
            self._device,
            space_map,
            log=self._log,
            counts=None if self._skip_mappings else counts,
            counts_are_complete=complete,
        ).run()
