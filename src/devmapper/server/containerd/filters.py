"""Which snapshots a `List` request asks for: containerd's filters on snapshots.

The fields are those of containerd `snapshots/storage/bolt.go adaptSnapshot`: name, parent, kind and
labels.<key>, where the rest of the path, dots and all, is the label's key.  Any other field is not
there, and what is not there has the empty value: `!=` and `~=` can match it, `==` cannot.
"""

from collections.abc import Callable, Sequence

import re2

from devmapper.errors import UsageError
from devmapper.server.containerd.filter_syntax import Operator, Selector, parse
from devmapper.snapshots.model import Info

Filter = Callable[[Info], bool]


def compile_filters(filters: Sequence[str]) -> Filter:
    """What matches any of *filters*, everything without any.

    `UsageError` for one that cannot be parsed and, unlike containerd, which then matches nothing,
    for a regular expression that is none.
    """
    if not filters:
        return lambda _info: True
    alternatives = [[_condition(selector) for selector in parse(text)] for text in filters]
    return lambda info: any(
        all(condition(info) for condition in conditions) for conditions in alternatives
    )


def _condition(selector: Selector) -> Filter:
    path, operator, wanted = selector
    match operator:
        case Operator.PRESENT:
            return lambda info: _field(info, path) is not None
        case Operator.EQUAL:
            return lambda info: _field(info, path) == wanted
        case Operator.NOT_EQUAL:
            return lambda info: (_field(info, path) or "") != wanted
        case Operator.MATCHES:
            search = _search(wanted)
            return lambda info: search(_field(info, path) or "")


def _field(info: Info, path: Sequence[str]) -> str | None:
    match path[0]:
        case "name":
            return info.name
        case "parent":
            return info.parent
        case "kind":
            return info.kind.value
        case "labels":
            return info.labels.get(".".join(path[1:]))
        case _:
            return None


def _search(expression: str) -> Callable[[str], bool]:
    """Whether text holds what a regular expression of Go matches, in linear time."""
    options = re2.Options()
    options.log_errors = False
    try:
        pattern = re2.compile(expression, options)
    except (re2.error, UnicodeEncodeError) as err:
        raise UsageError(f"filter: {expression!a} is no regular expression of RE2") from err

    def search(text: str) -> bool:
        return pattern.search(text) is not None

    return search
