"""What travels on the control socket: length-prefixed JSON, one message each way at a time.

    request   {"version": 1, "op": "create_snap", "args": {"thin_id": 2, "origin": 1}}
    reply     {"value": …}  or  {"error": {"class": "ThinIdExists", …}}

Values are the NamedTuples of the port, as objects with the names of their fields.  Errors travel
as the name of their class and their attributes, and are raised as the same class on the other
side.  Both ends are the same program run by the same user; messages are checked all the same,
because the two may be of different versions.
"""

import functools
import json
import os
import socket
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from struct import Struct
from typing import Any, Final, NewType, TypeVar

from devmapper import errors
from devmapper.errors import DevmapperError, EngineError, EngineGone

VERSION: Final = 1
MESSAGE_LIMIT: Final = 64 * 1024 * 1024
_LENGTH: Final = Struct(">I")
_DESCRIPTOR: Final = Struct("=i")
_PIECE: Final = 1 << 20
_ENDED: Final = "the connection to the engine process has ended"

T = TypeVar("T")


class Disconnected(EngineGone):
    """The other side closed the connection where a message was expected."""


def send(
    connection: socket.socket, message: Mapping[str, object], *, descriptor: int | None = None
) -> None:
    """Send one message, and a descriptor with it, which the receiver gets a copy of."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > MESSAGE_LIMIT:
        raise EngineError(f"a message of {len(body)} bytes is longer than {MESSAGE_LIMIT}")
    head = _LENGTH.pack(len(body))
    if descriptor is not None:
        sent = socket.send_fds(connection, [head], [descriptor])
        head = head[sent:]
    connection.sendall(head + body)


def receive(connection: socket.socket) -> dict[str, Any]:
    """Receive one message; `Disconnected` if the other side has gone."""
    return _receive_body(connection, _receive_exactly(connection, _LENGTH.size))


@contextmanager
def received(connection: socket.socket) -> Iterator[tuple[dict[str, Any], int | None]]:
    """As `receive`, with the descriptor that came along, which is closed afterwards."""
    # Not `socket.recv_fds`, which forgets its flags
    room = socket.CMSG_SPACE(_DESCRIPTOR.size)
    head, sent_along, _, _ = connection.recvmsg(_LENGTH.size, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = [
        descriptor
        for level, kind, data in sent_along
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (descriptor,) in _DESCRIPTOR.iter_unpack(data)
    ]
    try:
        if not head:
            raise Disconnected(_ENDED)
        head += _receive_exactly(connection, _LENGTH.size - len(head))
        yield _receive_body(connection, head), descriptors[0] if descriptors else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _receive_body(connection: socket.socket, head: bytes) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(head)
    if length > MESSAGE_LIMIT:
        raise EngineError(f"a message of {length} bytes is longer than {MESSAGE_LIMIT}")
    return parse(_receive_exactly(connection, length))


def parse(body: bytes) -> dict[str, Any]:
    """The object in a message's body."""
    try:
        message = json.loads(body)
    except ValueError as err:
        raise EngineError(f"a message on the control socket is no JSON: {err}") from err
    if not isinstance(message, dict):
        raise EngineError(f"a message on the control socket is a {type(message).__name__}")
    return message


def pack(value: object) -> object:
    """Spell a value of the port (NamedTuple, Path, list of them, plain) as JSON has it."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: pack(item) for key, item in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [pack(item) for item in value]
    if isinstance(value, Path):
        return os.fspath(value)
    return value


def unpack(kind: type[T], value: object) -> T:
    """Read a value of the type *kind*; `EngineError` names what has another type."""
    return typing.cast("T", _unpack(kind, value))


def _unpack(kind: Any, value: object) -> Any:  # noqa: ANN401 - the border to JSON
    if kind is type(None):
        return _checked(value is None, kind, value)
    if isinstance(kind, NewType):
        return _unpack(kind.__supertype__, value)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return None if value is None else _unpack(inner, value)
    if origin in (list, tuple):
        (inner, *_) = typing.get_args(kind)
        _checked(isinstance(value, list), kind, value)
        return origin(_unpack(inner, item) for item in typing.cast("list[object]", value))
    if hasattr(kind, "_fields"):
        return _unpack_fields(kind, value)
    return _unpack_plain(kind, value)


def pack_error(error: BaseException) -> dict[str, object]:
    """Spell an error so that `unpack_error` can raise it again.

    Only our own tree and `OSError` travel as what they are; anything else is a defect of the
    engine, which its log has with a traceback.
    """
    if isinstance(error, DevmapperError):
        return {
            "class": type(error).__name__,
            "message": str(error),
            "attributes": {key: _pack_attribute(item) for key, item in vars(error).items()},
        }
    if isinstance(error, OSError):
        return {
            "class": "OSError",
            "errno": error.errno,
            "text": error.strerror or str(error),
            "file": None if error.filename is None else os.fsdecode(error.filename),
        }
    return {
        "class": EngineError.__name__,
        "message": f"defect in the engine process: {type(error).__name__}: {error}",
        "attributes": {"hint": "its log has the details; please report it"},
    }


def unpack_error(value: Mapping[str, Any]) -> Exception:
    """The error that `pack_error` spelled."""
    name = value.get("class")
    if name == "OSError":
        return OSError(value.get("errno"), value.get("text"), value.get("file"))
    found = _error_classes().get(str(name))
    if found is None:
        return EngineError(f"engine process reported {name!r}: {value.get('message')}")
    # Not through __init__, whose parameters differ from class to class
    error = found.__new__(found, value.get("message", ""))
    for key, item in dict(value.get("attributes", {})).items():
        setattr(error, key, _unpack_attribute(item))
    return error


@functools.cache
def _error_classes() -> Mapping[str, type[DevmapperError]]:
    return {
        name: item
        for name, item in vars(errors).items()
        if isinstance(item, type) and issubclass(item, DevmapperError)
    }


def _pack_attribute(value: object) -> object:
    if isinstance(value, Path):
        return {"path": os.fspath(value)}
    if isinstance(value, StrEnum):
        return {"enum": type(value).__name__, "value": value.value}
    if isinstance(value, tuple | list):
        return [_pack_attribute(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return repr(value)


def _unpack_attribute(value: object) -> object:
    if isinstance(value, list):
        return tuple(_unpack_attribute(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "path" in value:
        return Path(value["path"])
    kind = vars(errors).get(value.get("enum", ""))
    return kind(value.get("value")) if isinstance(kind, type) else value.get("value")


def _unpack_fields(kind: Any, value: object) -> Any:  # noqa: ANN401 - the border to JSON
    _checked(isinstance(value, dict), kind, value)
    fields = typing.cast("dict[str, object]", value)
    # A field with a default is one that an older version at the other end does not know
    missing = [name for name in kind._fields if name not in {**kind._field_defaults, **fields}]
    if missing:
        raise EngineError(f"{kind.__name__} on the control socket lacks {', '.join(missing)}")
    hints = _field_types(kind)
    known = [name for name in kind._fields if name in fields]
    return kind(**{name: _unpack(hints[name], fields[name]) for name in known})


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _unpack_plain(kind: type, value: object) -> object:
    if issubclass(kind, Path):
        return Path(_checked(isinstance(value, str), kind, value))
    if issubclass(kind, StrEnum):
        try:
            return kind(str(value))
        except ValueError:
            return _checked(False, kind, value)  # noqa: FBT003
    # bool is an int to Python, but not to whoever reads a thin id
    same = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    return _checked(same, kind, value)


def _checked(ok: bool, kind: Any, value: Any) -> Any:  # noqa: ANN401, FBT001 - the border to JSON
    if not ok:
        expected = getattr(kind, "__name__", str(kind))
        raise EngineError(f"value {value!r} on the control socket: expected {expected}")
    return value


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(min(length - len(data), _PIECE))
        if not piece:
            raise Disconnected(_ENDED)
        data += piece
    return bytes(data)
