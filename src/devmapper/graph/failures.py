"""Errors between daemon and command: `{"error": {"class", "message", "hint", "exit_code", …}}`.

A command shall say and do the same whoever holds the graph, so an error arrives as what it was: of
the same class of `devmapper.errors`, with the same words; one whose class the command does not know
is a `RemoteError`.  An `OSError` arrives as one: the command words it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from devmapper.errors import DevmapperError, EngineError

INTERNAL_ERROR: Final = 70  # EX_SOFTWARE
_FAILED: Final = 1
_ERROR: Final = "error"


class RemoteError(DevmapperError):
    """What the daemon reports and this program has no class for."""


class DaemonError(EngineError):
    """The daemon is gone, or has said what nobody understands."""


def to_json(error: BaseException) -> dict[str, object]:
    """The object that tells of *error*."""
    told: dict[str, object] = {
        "class": type(error).__name__,
        "message": _message(error),
        "hint": "",
        "exit_code": _FAILED,
    }
    match error:
        case DevmapperError():
            told |= {"hint": error.hint, "exit_code": error.exit_code, "data": _data(error)}
        case OSError(errno=int()):
            names = [error.filename, error.filename2]
            told |= {
                "class": OSError.__name__,
                "errno": error.errno,
                "strerror": error.strerror or "",
                "files": [str(name) for name in names if name is not None],
            }
        case OSError() | MemoryError():
            pass
        case _:
            told |= {
                "message": f"internal error: {type(error).__name__}: {error}",
                "hint": "the daemon's log has the traceback: report it",
                "exit_code": INTERNAL_ERROR,
            }
    if notes := getattr(error, "__notes__", ()):
        told["notes"] = list(notes)
    return {_ERROR: told}


def from_json(members: Mapping[str, object]) -> Exception:
    """The error that `to_json` has told of."""
    told = members.get(_ERROR)
    if not isinstance(told, dict):
        return DaemonError(f"the daemon's answer is no error: {str(members)[:100]}")
    error = _rebuilt(told)
    notes = told.get("notes")
    for note in notes if isinstance(notes, list) else ():
        error.add_note(str(note))
    return error


def loads(text: bytes) -> dict[str, object]:
    """A JSON object; `DaemonError` for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise DaemonError(f"the daemon's answer is not JSON: {text[:100]!r}") from err
    if not isinstance(found, dict):
        raise DaemonError(f"the daemon's answer is no object: {text[:100]!r}")
    return found


def _rebuilt(told: Mapping[str, object]) -> Exception:
    number, files = told.get("errno"), told.get("files")
    if isinstance(number, int):
        names = [str(name) for name in files] if isinstance(files, list) else []
        error = OSError(number, str(told.get("strerror", "")))
        error.filename, error.filename2 = [*names, None, None][:2]
        return error
    message, hint = str(told.get("message", "")), str(told.get("hint", ""))
    known = {each.__name__: each for each in _tree(DevmapperError)}
    kind = known.get(str(told.get("class")))
    if kind is None:
        code = told.get("exit_code")
        exit_code = code if isinstance(code, int) and 0 < code < 128 else _FAILED
        unknown: type[RemoteError] = type("RemoteError", (RemoteError,), {"exit_code": exit_code})
        return unknown(message, hint=hint)
    rebuilt = kind.__new__(kind)
    DevmapperError.__init__(rebuilt, message, hint=hint)
    data = told.get("data")
    for name, value in data.items() if isinstance(data, dict) else ():
        if not name.startswith("_"):
            setattr(rebuilt, name, _from_member(value))
    return rebuilt


def _tree(kind: type[DevmapperError]) -> Iterator[type[DevmapperError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _tree(each)


def _message(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r}: {error.strerror}"
    return str(error)


def _data(error: DevmapperError) -> dict[str, object]:
    """What the error carries beside its words, as far as it is plain."""
    return {
        name: _to_member(value)
        for name, value in vars(error).items()
        if not name.startswith("_") and name != "hint" and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, str | int | Path)


def _to_member(value: object) -> object:
    return {"path": str(value)} if isinstance(value, Path) else value


def _from_member(value: object) -> object:
    if isinstance(value, dict):
        return Path(str(value.get("path", "")))
    return tuple(value) if isinstance(value, list) else value
