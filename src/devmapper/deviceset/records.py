"""Docker's JSON files in `<home>/metadata`: how they are spelled, read and replaced.

Byte-compatible with moby: compact, keys in its order, no newline at the end.  Keys that we do not
know are kept when a file is rewritten, so that a newer Docker finds its own again.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.deviceset.names import (
    DEVICESET_METADATA,
    MIGRATED_SUFFIX,
    TRANSACTION_METADATA,
    LayerId,
    file_name,
    layer_of_file,
)
from devmapper.errors import RecordCorrupt
from devmapper.linux.files import save_file, sync_directory, unlink_durably
from devmapper.units import MAX_THIN_ID, Bytes, ThinId, TransactionId

_MAX_FILE: Final = 1024**2
_UINT64: Final = 2**64 - 1
_INT64: Final = 2**63 - 1

Extra = tuple[tuple[str, object], ...]


class LayerRecord(NamedTuple):
    """One layer.  Only the base layer is ever `initialized`; a `deleted` one is on its way out."""

    thin_id: ThinId
    size: Bytes
    transaction_id: TransactionId
    initialized: bool = False
    deleted: bool = False
    extra: Extra = ()


class DeviceSetRecord(NamedTuple):
    """The graph as a whole."""

    next_device_id: int = 0  # the id that was given out last
    base_uuid: str = ""
    base_file_system: str = ""
    extra: Extra = ()


class TransactionRecord(NamedTuple):
    """An operation that was begun; it has ended if the pool has reached *open_transaction_id*."""

    open_transaction_id: TransactionId
    layer: LayerId
    thin_id: ThinId
    extra: Extra = ()


class RecordStore:
    """The directory of records.  Writes are durable when they return."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prepare(self) -> None:
        """Make the directory, and remove what interrupted writes left in it."""
        if not self.directory.is_dir():
            self.directory.mkdir(mode=0o700, exist_ok=True)
            sync_directory(self.directory.parent)
        for entry in os.scandir(self.directory):
            if entry.name.startswith(".tmp"):
                with suppress(OSError):  # harmless where it stays: scans skip it
                    Path(entry.path).unlink()

    def load(self, layer: LayerId) -> LayerRecord | None:
        """The record of a layer, None if it has none; `RecordCorrupt` if it cannot be trusted."""
        path = self._path(layer)
        fields = read_fields(path)
        return None if fields is None else decode_layer(fields)

    def save(self, layer: LayerId, record: LayerRecord) -> None:
        save_file(self._path(layer), encode_layer(record))

    def remove(self, layer: LayerId) -> None:
        unlink_durably(self._path(layer), missing_ok=True)

    def layers(self) -> Iterator[LayerId]:
        """The layers that have a record, deleted ones too.

        What moby's scan skips is skipped, and so is the transaction file, which moby 1.7 took for
        a device.
        """
        with os.scandir(self.directory) as entries:
            names = [entry.name for entry in entries if not entry.is_dir()]
        for name in names:
            if name.startswith(".") or name.endswith(MIGRATED_SUFFIX):
                continue
            if name not in (DEVICESET_METADATA, TRANSACTION_METADATA):
                yield layer_of_file(name)

    def load_all(self) -> dict[LayerId, LayerRecord]:
        found = {}
        for layer in self.layers():
            record = self.load(layer)
            if record is not None:  # removed meanwhile
                found[layer] = record
        return found

    def load_deviceset(self) -> DeviceSetRecord:
        path = self.directory / DEVICESET_METADATA
        fields = read_fields(path)
        if fields is None:
            return DeviceSetRecord()
        return DeviceSetRecord(
            fields.integer("next_device_id", MAX_THIN_ID, default=0),
            fields.text("BaseDeviceUUID", default=""),
            fields.text("BaseDeviceFilesystem", default=""),
            fields.rest(),
        )

    def save_deviceset(self, record: DeviceSetRecord) -> None:
        save_file(self.directory / DEVICESET_METADATA, encode_deviceset(record))

    def load_transaction(self) -> TransactionRecord | None:
        path = self.directory / TRANSACTION_METADATA
        fields = read_fields(path)
        if fields is None:
            return None
        return TransactionRecord(
            TransactionId(fields.integer("open_transaction_id", _UINT64)),
            LayerId(fields.text("device_hash")),
            ThinId(fields.integer("device_id", MAX_THIN_ID)),
            fields.rest(),
        )

    def save_transaction(self, record: TransactionRecord) -> None:
        save_file(self.directory / TRANSACTION_METADATA, encode_transaction(record))

    def remove_transaction(self) -> None:
        unlink_durably(self.directory / TRANSACTION_METADATA, missing_ok=True)

    def _path(self, layer: LayerId) -> Path:
        return self.directory / file_name(layer)


def encode_layer(record: LayerRecord) -> bytes:
    return _encode(
        ("device_id", record.thin_id),
        ("size", record.size),
        ("transaction_id", record.transaction_id),
        ("initialized", record.initialized),
        ("deleted", record.deleted),
        *record.extra,
    )


def encode_deviceset(record: DeviceSetRecord) -> bytes:
    return _encode(
        ("next_device_id", record.next_device_id),
        ("BaseDeviceUUID", record.base_uuid),
        ("BaseDeviceFilesystem", record.base_file_system),
        *record.extra,
    )


def encode_transaction(record: TransactionRecord) -> bytes:
    return _encode(
        ("open_transaction_id", record.open_transaction_id),
        ("device_hash", record.layer),
        ("device_id", record.thin_id),
        *record.extra,
    )


def decode_layer(fields: "Fields") -> LayerRecord:
    """A layer's record; `RecordCorrupt` names the member that is missing or wrong."""
    return LayerRecord(
        ThinId(fields.integer("device_id", MAX_THIN_ID)),
        Bytes(fields.integer("size", _INT64)),
        TransactionId(fields.integer("transaction_id", _UINT64)),
        fields.boolean("initialized", default=False),
        fields.boolean("deleted", default=False),
        fields.rest(),
    )


def _encode(*items: tuple[str, object]) -> bytes:
    text = json.dumps(dict(items), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Go's encoder escapes these three so that JSON may stand in HTML
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()


class Fields:
    """Members of a JSON object, taken out one by one with their types checked.

    Names match as Go's decoder matches them: whatever their case, the last one wins.
    """

    def __init__(self, path: Path, members: list[tuple[str, object]]) -> None:
        self._path = path
        self._left = dict(members)
        self._names: dict[str, list[str]] = {}
        for key in self._left:
            self._names.setdefault(key.lower(), []).append(key)

    def integer(self, name: str, limit: int, *, default: int | None = None) -> int:
        value = self._take(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, "an integer", value)
        if not 0 <= value <= limit:
            raise self._wrong(name, f"0 to {limit}", value)
        return value

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, *, default: str | None = None) -> str:
        value = self._take(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return value

    def mapping(self, name: str) -> dict[str, object]:
        value = self._take(name, None)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return value

    def rest(self) -> Extra:
        return tuple(self._left.items())

    def _take(self, name: str, default: object) -> object:
        value: object = None
        for key in self._names.pop(name.lower(), ()):
            value = self._left.pop(key)
        if value is not None:
            return value
        if default is None:
            raise RecordCorrupt(self._path, f"{name!r} is missing")
        return default

    def _wrong(self, name: str, expected: str, value: object) -> RecordCorrupt:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
        return RecordCorrupt(self._path, f"{name!r} is {shown}, expected {expected}")


def read_fields(path: Path, *, limit: int = _MAX_FILE) -> Fields | None:
    """The members of the file's one object, None if there is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise RecordCorrupt(path, "it is not a regular file")
        # Records are replaced, never written to: the size of an open one does not change.  Asking
        # for no more than that keeps Python from allocating for the largest one possible
        wanted = min(found.st_size, limit + 1)
        raw = b""
        while len(raw) < wanted:
            piece = os.read(fd, wanted - len(raw))
            if not piece:
                break
            raw += piece
    finally:
        os.close(fd)
    if len(raw) > limit:
        raise RecordCorrupt(path, f"it is larger than {limit} bytes")
    try:
        members = _DECODER.decode(raw.decode())
    except (ValueError, RecursionError) as err:
        raise RecordCorrupt(path, f"it is not JSON ({err})") from err
    if not isinstance(members, _Pairs):
        raise RecordCorrupt(path, "it is not a JSON object")
    try:
        return Fields(path, [(key, _plain(value)) for key, value in members])
    except RecursionError as err:
        raise RecordCorrupt(path, "it is nested too deeply") from err


class _Pairs(list[tuple[str, object]]):
    """An object's members in order, told apart from an array."""


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_Pairs
)  # making one takes longer than using it


def _plain(value: object) -> object:
    if isinstance(value, _Pairs):
        return {key: _plain(member) for key, member in value}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    return value
