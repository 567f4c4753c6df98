"""Ids of a user namespace: in a tar they are those of the container, on disk those of the host.

moby `idtools` IdentityMapping, as `pkg/archive` uses it for the tars of a daemon with
`--userns-remap`.  Access lists and capabilities hold ids too, which moby leaves as they are.
"""

import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from devmapper.errors import ArchiveError, UsageError
from devmapper.layerdiff import id_xattrs

if TYPE_CHECKING:
    from devmapper.layerdiff.tarformat import Entry

OVERFLOW_ID: Final = 65534  # what the kernel shows for an id that a namespace does not have

_MAX_ID: Final = 2**32 - 2
_EVERY_ID: Final = (0, 0, _MAX_ID + 1)
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID

Map = tuple[int, int, int]  # first id in the container, first id on the host, how many
_Lookup = Callable[[int], int | None]


class HostIds(NamedTuple):
    uid: int
    gid: int


class Ids:
    """Maps as user_namespaces(7) has them; a kind of ids without any is the same on both sides.

    They may not overlap, and have to have the container's root: `UsageError`.  Never changed, so
    any thread may use it.
    """

    def __init__(self, uid_maps: Iterable[Map] = (), gid_maps: Iterable[Map] = ()) -> None:
        self.uid_maps: tuple[Map, ...] = tuple(uid_maps)
        self.gid_maps: tuple[Map, ...] = tuple(gid_maps)
        self.is_identity = not (self.uid_maps or self.gid_maps)
        self._uid_on_host = _Ranges(self.uid_maps or (_EVERY_ID,)).find
        self._gid_on_host = _Ranges(self.gid_maps or (_EVERY_ID,)).find
        self._uid_in_container = _Ranges(_inverted(self.uid_maps or (_EVERY_ID,))).find
        self._gid_in_container = _Ranges(_inverted(self.gid_maps or (_EVERY_ID,))).find
        uid, gid = self._uid_on_host(0), self._gid_on_host(0)
        if uid is None or gid is None:
            raise UsageError("id maps have no root: expected one that begins with container id 0")
        self.root = HostIds(uid, gid)

    def on_host(self, entry: "Entry") -> "Entry":
        """*entry* of a tar, with the ids that it has on disk.

        `ArchiveError` for an id that no map has; moby fails too.
        """
        if self.is_identity:
            return entry

        def required(kind: str, find: _Lookup) -> Callable[[int], int]:
            def found(value: int) -> int:
                translated = find(value)
                if translated is None:
                    reason = f"{kind} id {value} is in none of the maps of the user namespace"
                    raise ArchiveError(entry.name, reason)
                return translated

            return found

        uid = required("user", self._uid_on_host)
        gid = required("group", self._gid_on_host)
        xattrs = id_xattrs.translated(entry.xattrs, uid, gid)
        return entry._replace(uid=uid(entry.uid), gid=gid(entry.gid), xattrs=xattrs)

    def in_container(self, entry: "Entry") -> "tuple[Entry, str]":
        """*entry* as it is on disk, with the ids of a tar; and, in words, one that no map has.

        As in the container itself, such an owner is `OVERFLOW_ID`, and his set-id bits mean
        nothing: they are not handed on to whoever has that id.  What such an id is granted in
        access lists and capabilities is left out, as nobody in the container can be it.
        """
        if self.is_identity:
            return entry, ""
        missing: list[str] = []

        def noting(kind: str, find: _Lookup) -> _Lookup:
            def found(value: int) -> int | None:
                translated = find(value)
                if translated is None:
                    missing.append(f"{kind} id {value}")
                return translated

            return found

        find_uid = noting("user", self._uid_in_container)
        find_gid = noting("group", self._gid_in_container)
        uid, gid = find_uid(entry.uid), find_gid(entry.gid)
        is_foreign = uid is None or gid is None
        translated = entry._replace(
            uid=OVERFLOW_ID if uid is None else uid,
            gid=OVERFLOW_ID if gid is None else gid,
            mode=entry.mode & ~_SET_ID if is_foreign else entry.mode,
            xattrs=id_xattrs.translated(entry.xattrs, find_uid, find_gid),
        )
        return translated, missing[0] if missing else ""


class _Ranges:
    """Where ids go to; `find` is None for those that are in no range."""

    def __init__(self, ranges: Iterable[Map]) -> None:
        self._ranges = sorted(tuple(each) for each in ranges)
        self._begins = [begin for begin, _, _ in self._ranges]

    def find(self, value: int) -> int | None:
        index = bisect_right(self._begins, value) - 1
        if index < 0:
            return None
        begin, target, size = self._ranges[index]
        return target + value - begin if value - begin < size else None


def _inverted(maps: Iterable[Map]) -> Iterable[Map]:
    return [(host, container, size) for container, host, size in maps]


IDENTITY: Final = Ids()
