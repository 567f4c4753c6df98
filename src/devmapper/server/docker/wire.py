"""Docker's graphdriver plugin protocol: what stands in its requests and replies.

Source: moby `daemon/graphdriver/proxy.go` and `pkg/plugins`, at the last commit that has the
protocol.  Member names match in any case, as Go's decoder has it, and the last one of a name wins;
one that is null or missing is empty; unknown ones are ignored.  No I/O, no graph.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from devmapper.deviceset.id_maps import IdMap
from devmapper.errors import UsageError

MAX_REQUEST: Final = 1024**2  # bytes; Docker's longest are the id maps of its start, some KiB
NEWEST: Final = "application/vnd.docker.plugins.v1.2+json"

_FAMILY: Final = re.compile(r"application/vnd\.docker\.plugins\.v1(?:\.(\d{1,4}))?\+json")
_ANY: Final = frozenset({"", "*/*", "application/*", "application/json"})
_MINOR: Final = 2
_SHOWN: Final = 40


class LayerRequest(NamedTuple):
    """What most requests hold; a member that Docker leaves out is empty."""

    id: str = ""
    parent: str = ""
    mount_label: str = ""
    storage_opt: Mapping[str, str] = {}


class InitRequest(NamedTuple):
    home: str
    opts: tuple[str, ...]
    uid_maps: tuple[IdMap, ...]
    gid_maps: tuple[IdMap, ...]


@functools.lru_cache(maxsize=64)
def reply_type(accept: str) -> str | None:
    """The media type to answer with, None if the client takes none that we speak.

    Versions 1, 1.1 and 1.2 differ in what may be asked, not in how it is spelled; a later 1.x is
    answered as 1.2.  Who names no version, such as curl, gets the newest.
    """
    for word in accept.lower().split(","):
        name = word.partition(";")[0].strip()
        if name in _ANY:
            return NEWEST
        if found := _FAMILY.fullmatch(name):
            return name if int(found[1] or 0) <= _MINOR else NEWEST
    return None


def decode_layer(raw: bytes) -> LayerRequest:
    """A request about one layer; `UsageError` if it names none."""
    members = _members(raw)
    found = LayerRequest(
        _text(members, "ID"),
        _text(members, "Parent"),
        _text(members, "MountLabel"),
        _texts(members, "StorageOpt"),
    )
    if not found.id:
        raise UsageError("the request names no layer: member 'ID' is missing")
    return found


def decode_transfer(query: Mapping[str, str]) -> LayerRequest:
    """The request that stands in the URL of ApplyDiff."""
    found = LayerRequest(query.get("id", ""), query.get("parent", ""))
    if not found.id:
        raise UsageError("the request names no layer: expected ApplyDiff?id=...")
    return found


def decode_nothing(raw: bytes) -> LayerRequest:
    """A request that holds nothing: Docker sends `{}`, or no body at all."""
    if raw.strip():
        _members(raw)
    return LayerRequest()


def decode_init(raw: bytes) -> InitRequest:
    members = _members(raw)
    options = _array(members, "Opts")
    for option in options:
        if not isinstance(option, str):
            raise _wrong("Opts", "strings", option)
    return InitRequest(
        _text(members, "Home"),
        tuple(map(str, options)),
        _id_maps(members, "UIDMaps"),
        _id_maps(members, "GIDMaps"),
    )


def encode(members: Mapping[str, object]) -> bytes:
    """A reply; bytes of names that are no UTF-8 arrive at Docker as U+FFFD, as its own do."""
    return _ENCODER.encode(members).encode("ascii")


def _members(raw: bytes) -> dict[str, object]:
    """The members of the one object in a body, by their names in lower case."""
    if not raw.strip():
        # Docker's client sends a request again without its body if the connection was lost
        raise UsageError("the request has no body: expected a JSON object")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise UsageError(f"the request is not JSON: {err}") from err
    if not isinstance(found, dict):
        raise UsageError(f"the request is {_shown(found)}, expected a JSON object")
    return {name.lower(): value for name, value in found.items()}


def _array(members: dict[str, object], name: str) -> list[object]:
    value = members.get(name.lower())
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong(name, "an array", value)
    return value


def _text(members: dict[str, object], name: str) -> str:
    value = members.get(name.lower())
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    return value


def _texts(members: dict[str, object], name: str) -> Mapping[str, str]:
    value = members.get(name.lower())
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    for each in value.values():
        if not isinstance(each, str):
            raise _wrong(name, "strings", each)
    return value


def _id_maps(members: dict[str, object], name: str) -> tuple[IdMap, ...]:
    """Spelled `container_id` by late versions of Docker, `ContainerID` by its documentation."""
    return tuple(_id_map(name, each) for each in _array(members, name))


def _id_map(name: str, value: object) -> IdMap:
    if not isinstance(value, dict):
        raise _wrong(name, "objects", value)
    numbers = {key.lower().replace("_", ""): number for key, number in value.items()}
    found = [numbers.get(key, 0) for key in ("containerid", "hostid", "size")]
    for number in found:
        if not isinstance(number, int) or isinstance(number, bool):
            raise _wrong(name, "whole numbers", number)
    return IdMap(*found)


def _wrong(name: str, expected: str, value: object) -> UsageError:
    return UsageError(f"member {name!r} of the request holds {_shown(value)}, expected {expected}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
