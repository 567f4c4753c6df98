"""Who owns what of a graph whose containers run in a user namespace.

The root of such a container is an ordinary user of the host, given by maps as user_namespaces(7)
has them.  What it has to reach is owned by it: moby `idtools` GetRootUIDGID, MkdirAndChown.
"""

import os
from collections.abc import Iterable
from itertools import pairwise
from typing import Final, NamedTuple

from devmapper.errors import UsageError

_MAX_ID: Final = 2**32 - 2  # -1 means "leave it" to chown(2)


class IdMap(NamedTuple):
    """*size* ids from *container_id* on are, outside of the container, those from *host_id* on."""

    container_id: int
    host_id: int
    size: int

    def __str__(self) -> str:
        return f"{self.container_id}:{self.host_id}:{self.size}"


_EVERY_ID: Final = IdMap(0, 0, _MAX_ID + 1)


class Owner(NamedTuple):
    """Ids of the host."""

    uid: int = 0
    gid: int = 0

    def give(self, fd: int) -> None:
        """Let what is open as *fd* be owned by this one; nothing is touched where it is so."""
        found = os.fstat(fd)
        if (found.st_uid, found.st_gid) != self:
            os.fchown(fd, self.uid, self.gid)


ROOT: Final = Owner()


def container_root(uid_maps: Iterable[IdMap], gid_maps: Iterable[IdMap]) -> Owner:
    """Who the root of the containers is on the host; without maps, root.

    `UsageError` for maps that the kernel would refuse, and for those that have no root.
    """
    return Owner(_root("uid", list(uid_maps)), _root("gid", list(gid_maps)))


def canonical(maps: Iterable[IdMap]) -> tuple[IdMap, ...]:
    """The same map in one spelling: sorted, what joins as one; none for all ids as they are."""
    found: list[IdMap] = []
    for each in sorted(maps):
        if found:
            last = found[-1]
            ends = (last.container_id + last.size, last.host_id + last.size)
            if ends == (each.container_id, each.host_id):
                found[-1] = last._replace(size=last.size + each.size)
                continue
        found.append(each)
    return () if found == [_EVERY_ID] else tuple(found)


def show_maps(maps: Iterable[IdMap]) -> str:
    """For people."""
    return ", ".join(map(str, canonical(maps))) or "no id maps"


def parse_id_map(text: str) -> IdMap:
    """Read `CONTAINER:HOST:SIZE`, such as `0:100000:65536`."""
    words = text.split(":")
    if len(words) != 3 or not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(
            f"id map {text!r}: expected CONTAINER:HOST:SIZE", hint="such as 0:100000:65536"
        )
    if any(len(word) > 10 for word in words):
        raise UsageError(f"id map {text!r}: ids end at {_MAX_ID}")
    return IdMap(*map(int, words))


def _root(kind: str, maps: list[IdMap]) -> int:
    if not maps:
        return 0
    for each in maps:
        _check_range(kind, each)
    for name, begin in (("container", 0), ("host", 1)):
        for low, high in pairwise(sorted(maps, key=lambda each: each[begin])):
            if low[begin] + low.size > high[begin]:
                raise UsageError(f"{kind} maps {low} and {high} overlap in their {name} ids")
    for each in maps:
        if each.container_id == 0:
            return each.host_id
    raise UsageError(
        f"{kind} maps {', '.join(map(str, maps))} have no root: expected one that begins with"
        " container id 0"
    )


def _check_range(kind: str, each: IdMap) -> None:
    if each.size < 1:
        raise UsageError(f"{kind} map {each} has size {each.size}, expected at least 1")
    for begin in (each.container_id, each.host_id):
        if begin < 0 or begin + each.size - 1 > _MAX_ID:
            raise UsageError(f"{kind} map {each} leaves the range of ids, 0 to {_MAX_ID}")
