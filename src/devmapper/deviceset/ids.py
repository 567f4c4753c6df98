"""Which thin ids of a pool are taken, and which one comes next."""

from collections.abc import Iterable
from typing import Final

from devmapper.errors import ThinIdsExhausted
from devmapper.units import MAX_THIN_ID, ThinId

MAX_DEVICE_ID: Final = MAX_THIN_ID
DEVICE_ID_MAP_SZ: Final = (MAX_DEVICE_ID + 1) // 8  # of moby's bitmap, one bit an id

_IDS: Final = MAX_THIN_ID + 1


class ThinIds:
    """Allocator over the 24-bit ids.  Not thread-safe: it lives under the graph's lock."""

    def __init__(self, used: Iterable[int], last: int) -> None:
        """*last* is the id given out most recently (`next_device_id` on disk, despite its name)."""
        self._used = {thin_id for thin_id in used if 0 <= thin_id <= MAX_THIN_ID}
        self.last = last % _IDS
        self.moved = False

    def allocate(self) -> ThinId:
        """Take the first free id after the last one, going round; `ThinIdsExhausted` if none.

        As moby `deviceset.go` getNextFreeDeviceID: the counter moves first, so that a new graph
        gives its base the id 1, and 0 comes only after 2**24-1.
        """
        if len(self._used) == _IDS:
            raise ThinIdsExhausted
        candidate = (self.last + 1) % _IDS
        while candidate in self._used:
            candidate = (candidate + 1) % _IDS
        self._used.add(candidate)
        self.last = candidate
        self.moved = True
        return ThinId(candidate)

    def take(self, ids: Iterable[int]) -> None:
        """Mark ids as used."""
        self._used.update(ids)

    def follow(self, thin_id: int) -> None:
        """Another process used *thin_id* last: go on from there, if that is ahead of us.

        Only so that the next id is free in all likelihood; the pool has the last word about it.
        """
        if 0 < (thin_id - self.last) % _IDS < _IDS // 2:
            self.last = thin_id

    def free(self, thin_id: int) -> None:
        self._used.discard(thin_id)
