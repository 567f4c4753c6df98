"""What a check of pool metadata finds, as values."""

from enum import StrEnum
from typing import Final, NamedTuple

from devmapper.thin.walk import KeyRange

_NAMED_THIN_IDS: Final = 8  # in text; the attribute holds all


class DamageKind(StrEnum):
    """What is damaged."""

    SUPERBLOCK = "superblock"
    NODE = "node"
    BITMAP = "bitmap"
    INDEX = "index"
    DETAILS = "details"
    MAPPING = "mapping"
    DATA_REF_COUNT = "data ref count"
    METADATA_REF_COUNT = "metadata ref count"
    LEAK = "leak"


class Damage(NamedTuple):
    """One finding.

    *block* is a block of the kind of *space* that is named: a data block only for `DATA_REF_COUNT`
    and some `LEAK`s.  *nr_blocks* blocks from there on are damaged in the same way.  *thin_ids* are
    the thin devices that lose something, *keys* the keys of the tree that cannot be reached or
    trusted.
    """

    kind: DamageKind
    block: int
    message: str
    thin_ids: tuple[int, ...] = ()
    keys: KeyRange | None = None
    nr_blocks: int = 1
    space: str = "metadata"

    def __str__(self) -> str:
        lost = f", {self.keys} lost" if self.keys is not None else ""
        named = ", ".join(map(str, self.thin_ids[:_NAMED_THIN_IDS]))
        if len(self.thin_ids) > _NAMED_THIN_IDS:
            named += f" and {len(self.thin_ids) - _NAMED_THIN_IDS} more"
        ids = f", thin id{'s' * (len(self.thin_ids) > 1)} {named}" if named else ""
        return f"{self.message}{lost}{ids}"


class CheckReport(NamedTuple):
    """Everything that a check found; leaks are counted in blocks and listed among the damages.

    *notes* are no damage: the metadata space map's summaries may promise less free space than its
    bitmaps have.  `thin_restore` leaves them one block short; all that is lost is that block.
    """

    damages: list[Damage]
    notes: list[Damage]
    leaked_data_blocks: int = 0
    leaked_metadata_blocks: int = 0
    needs_check: bool = False

    @property
    def clean(self) -> bool:
        """Nothing to say; the needs_check flag alone is no damage but an order to look."""
        return not self.damages


class DamageLog:
    """Collects findings; whom a damage in a shared subtree hurts is known only later."""

    def __init__(self) -> None:
        self._found: list[Damage] = []
        self._thin_ids: dict[int, set[int]] = {}
        self.notes: list[Damage] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(
        self, kind: DamageKind, block: int, message: str, *, keys: KeyRange | None = None
    ) -> int:
        """Note a damage of a metadata block; returns a number to name it by."""
        return self.note(Damage(kind, block, message, keys=keys))

    def note(self, damage: Damage) -> int:
        self._found.append(damage)
        return len(self._found) - 1

    def hurts(self, number: int, thin_id: int) -> None:
        """The damage of that number affects a thin device."""
        self._thin_ids.setdefault(number, set()).add(thin_id)

    def report(self, *, needs_check: bool = False, leaked: tuple[int, int] = (0, 0)) -> CheckReport:
        """Everything noted so far; *leaked* is data blocks, metadata blocks."""
        damages = [
            damage._replace(thin_ids=tuple(sorted(self._thin_ids.get(number, damage.thin_ids))))
            for number, damage in enumerate(self._found)
        ]
        return CheckReport(damages, self.notes, *leaked, needs_check)
