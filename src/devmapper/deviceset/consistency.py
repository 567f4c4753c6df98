"""Where records and pool disagree.  Nothing is ever repaired or destroyed for it."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Self

from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.records import LayerRecord
from devmapper.errors import PoolMismatch, ThinIdMissing
from devmapper.units import ThinId


class Consistency(NamedTuple):
    """What a comparison of all records with the pool has found."""

    missing: Mapping[str, ThinId]  # layers whose thin id the pool does not have
    unknown: tuple[ThinId, ...]  # thin ids of the pool that no layer has
    shared: Mapping[ThinId, tuple[str, ...]]  # thin ids that several layers have
    deleted: tuple[str, ...]  # layers whose deletion was put off; that is no disagreement

    @classmethod
    def of(cls, records: Mapping[LayerId, LayerRecord], present: Collection[ThinId]) -> Self:
        owners: dict[ThinId, list[str]] = {}
        for layer, record in sorted(records.items()):
            owners.setdefault(record.thin_id, []).append(file_name(layer))
        present = set(present)
        return cls(
            {
                file_name(layer): record.thin_id
                for layer, record in sorted(records.items())
                if record.thin_id not in present
            },
            tuple(sorted(present - owners.keys())),
            {thin_id: tuple(names) for thin_id, names in owners.items() if len(names) > 1},
            tuple(file_name(layer) for layer, record in sorted(records.items()) if record.deleted),
        )

    def findings(self) -> list[str]:
        """One sentence for each disagreement."""
        return [
            *(_missing(name, thin_id) for name, thin_id in self.missing.items()),
            *(
                f"layers {', '.join(map(repr, names))} have the same thin id {thin_id}"
                for thin_id, names in self.shared.items()
            ),
            *(f"thin id {thin_id} is in the pool, but no layer has it" for thin_id in self.unknown),
        ]


@contextmanager
def present_in_pool(layer: LayerId, thin_id: ThinId) -> Iterator[None]:
    """For what uses the thin device of *layer*: if the pool does not have it, say whose it is."""
    try:
        yield
    except ThinIdMissing as err:
        raise PoolMismatch(
            _missing(file_name(layer), thin_id),
            hint="devmapper check lists what differs; devmapper rm removes the layer's record",
        ) from err


def _missing(name: str, thin_id: int) -> str:
    return f"layer {name!r}: its thin id {thin_id} is not in the pool"
