"""Values as JSON and back, by the types that their classes declare.

A `NamedTuple` is an object with its fields as members; what its class does not declare is no
member.  The daemon refuses unknown members; a command takes no notice of them, so that it
understands a daemon that is newer.  No I/O.
"""

import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Any, Final, TypeVar

T = TypeVar("T")

_WORDS: Final = {int: "an integer", str: "a string", bool: "true or false", type(None): "null"}
_SHOWN: Final = 40  # characters of a wrong value


class Unfit(ValueError):
    """JSON that is not what was declared; the text is a sentence that names the member."""


def encode(value: object) -> object:
    """What `json.dumps` takes."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: encode(getattr(value, name)) for name in value._fields}
    if isinstance(value, Mapping):
        return {str(key): encode(member) for key, member in value.items()}
    if isinstance(value, tuple | list):
        return [encode(member) for member in value]
    if isinstance(value, Enum):
        return value.value
    return value


def decode(kind: type[T], value: object, *, strict: bool = True) -> T:
    """A *kind* of what `json.loads` gave; `Unfit`.  With *strict* no unknown member is allowed."""
    return typing.cast("T", _decode(kind, value, "", strict=strict))


def _decode(kind: Any, value: object, name: str, *, strict: bool) -> object:  # noqa: ANN401 - a type
    kind = getattr(kind, "__supertype__", kind)  # of a NewType
    origin = typing.get_origin(kind)
    if kind in _WORDS:
        if type(value) is not kind:
            raise _wrong(name, value, _WORDS[kind])
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_optional(kind, value, name, strict=strict)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), value, name, strict=strict)
    if origin is not None and issubclass(origin, Mapping):
        return _decode_mapping(typing.get_args(kind), value, name, strict=strict)
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            raise _wrong(name, value, f"one of {[each.value for each in kind]}") from None
    return _decode_fields(kind, value, name, strict=strict)


def _decode_optional(kind: Any, value: object, name: str, *, strict: bool) -> object:  # noqa: ANN401
    (inner,) = (each for each in typing.get_args(kind) if each is not type(None))
    return None if value is None else _decode(inner, value, name, strict=strict)


def _decode_tuple(
    kinds: tuple[Any, ...], value: object, name: str, *, strict: bool
) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise _wrong(name, value, "a list")
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _wrong(name, value, f"a list of {len(kinds)}")
    return tuple(
        _decode(kind, member, f"{name}[{number}]", strict=strict)
        for number, (kind, member) in enumerate(zip(kinds, value, strict=True))
    )


def _decode_mapping(
    kinds: tuple[Any, ...], value: object, name: str, *, strict: bool
) -> dict[object, object]:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    key_kind = getattr(kinds[0], "__supertype__", kinds[0])
    return {
        key_kind(key): _decode(kinds[1], member, f"{name}.{key}", strict=strict)
        for key, member in value.items()
    }


def _decode_fields(kind: Any, value: object, name: str, *, strict: bool) -> object:  # noqa: ANN401
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    declared = _fields(kind)
    unknown = sorted(value.keys() - declared.keys())
    if strict and unknown:
        raise Unfit(f"member {_shown(unknown[0])} is unknown")
    found = {}
    for field, inner in declared.items():
        if field in value:
            found[field] = _decode(
                inner, value[field], f"{name}.{field}" if name else field, strict=strict
            )
        elif field not in kind._field_defaults:
            raise Unfit(f"member {field!r} is missing")
    return kind(**found)


@lru_cache
def _fields(kind: Any) -> dict[str, Any]:  # noqa: ANN401
    hints = typing.get_type_hints(kind)
    return {field: hints[field] for field in kind._fields}


def _wrong(name: str, value: object, expected: str) -> Unfit:
    where = f"member {name!r}" if name else "the value"
    return Unfit(f"{where} is {_shown(value)}, expected {expected}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
