"""Just enough YAML to write a manifest: no library of ours reads or writes it.

Every scalar is JSON, which is YAML (1.2, section 1.3); text of several lines is a literal block.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

Value: TypeAlias = "Mapping[str, Value] | Sequence[Value] | str | int | bool"

_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*", re.ASCII)
_NOT_TEXT: Final = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})  # 1.1
_STEP: Final = "  "


def documents(values: Sequence[Value]) -> str:
    """Several documents of one stream."""
    return "---\n".join("".join(f"{line.rstrip()}\n" for line in _lines(value)) for value in values)


def _lines(value: Value) -> list[str]:
    match value:
        case {} if not value:
            return ["{}"]
        case Mapping():
            return [line for key, each in value.items() for line in _member(_key(key), each)]
        case str() | int():
            return [json.dumps(value, ensure_ascii=False)]
        case _:
            return [line for each in value for line in _item(each)] or ["[]"]


def _member(key: str, value: Value) -> list[str]:
    if isinstance(value, str) and "\n" in value:
        return [f"{key}: |", *(_STEP + line for line in value.splitlines())]
    lines = _lines(value)
    if len(lines) == 1 and (isinstance(value, str | int) or not value):
        return [f"{key}: {lines[0]}"]
    return [f"{key}:", *(_STEP + line for line in lines)]


def _item(value: Value) -> list[str]:
    first, *others = _lines(value)
    return [f"- {first}", *(_STEP + line for line in others)]


def _key(key: str) -> str:
    is_plain = _KEY.fullmatch(key) and key.lower() not in _NOT_TEXT
    return key if is_plain else json.dumps(key, ensure_ascii=False)
