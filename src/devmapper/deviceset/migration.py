"""The one file with all records of early versions of Docker, taken over into a file a layer.

`<home>/devicemapper/json` holds `{"Devices": {"<layer>": {…}, …}}`, where the key "" is the base
layer.  moby (deviceset.go migrateOldMetaData) ignores errors of single records and renames the file
away all the same; here it is all or nothing.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from devmapper.deviceset.names import LayerId, file_name, internal_layer_id
from devmapper.deviceset.records import (
    Fields,
    LayerRecord,
    RecordStore,
    decode_layer,
    encode_layer,
    read_fields,
)
from devmapper.deviceset.steps import Checkpoint, Step
from devmapper.errors import RecordCorrupt, UsageError
from devmapper.linux.files import sync_directory

log = logging.getLogger(__name__)

_MAX_FILE: Final = 64 * 1024**2  # a hundred bytes for each layer


class LegacyRecords:
    """What a legacy file says; everything in it has been checked."""

    def __init__(self, path: Path, records: Mapping[LayerId, LayerRecord]) -> None:
        self.path = path
        self.records = records

    @classmethod
    def read(cls, home: Path, store: RecordStore) -> Self | None:
        """The legacy file of the graph in *home*, None if there is none.

        `RecordCorrupt` if it cannot be taken over as a whole: it is damaged, or a layer of it has
        a record already that says something else.  Nothing was changed then.
        """
        path = home / "devicemapper" / "json"
        fields = read_fields(path, limit=_MAX_FILE)
        if fields is None:
            return None
        records = {
            _layer(path, name): _record(path, name, members)
            for name, members in fields.mapping("Devices").items()
        }
        _check_thin_ids(path, records)
        for layer, record in records.items():
            _check_own_record(path, store, layer, record)
        return cls(path, records)

    def migrate(self, store: RecordStore, checkpoint: Checkpoint) -> None:
        """Give each layer its own record, then rename the file to `json.migrated`; both durable.

        The rename comes last: after a crash before it the next start does all of it again, with
        the same result.  An error takes the new records back.
        """
        made: list[LayerId] = []
        try:
            for layer, record in self.records.items():
                if store.load(layer) is None:
                    made.append(layer)
                    store.save(layer, record)
                    checkpoint(Step.LAYER_MIGRATED)
            self.path.rename(f"{self.path}.migrated")
        except Exception:
            for layer in made:
                with suppress(OSError):  # what stays is equal to what the next start will write
                    store.remove(layer)
            raise
        sync_directory(self.path.parent)
        checkpoint(Step.LEGACY_MIGRATED)
        log.info("took %d layers over from %s", len(self.records), self.path)


def _layer(path: Path, name: str) -> LayerId:
    try:
        return internal_layer_id(name)
    except UsageError as err:
        raise RecordCorrupt(path, str(err)) from err


def _record(path: Path, name: str, members: object) -> LayerRecord:
    own_name = file_name(LayerId(name))
    if not isinstance(members, dict):
        raise RecordCorrupt(path, f"layer {own_name!r} is no JSON object")
    try:
        return decode_layer(Fields(path, list(members.items())))
    except RecordCorrupt as err:
        raise RecordCorrupt(path, f"layer {own_name!r}: {err.reason}") from err


def _check_thin_ids(path: Path, records: Mapping[LayerId, LayerRecord]) -> None:
    owners: dict[int, LayerId] = {}
    for layer, record in records.items():
        other = owners.setdefault(record.thin_id, layer)
        if other != layer:
            raise RecordCorrupt(
                path,
                f"layers {file_name(other)!r} and {file_name(layer)!r} both have"
                f" thin id {record.thin_id}",
            )


def _check_own_record(path: Path, store: RecordStore, layer: LayerId, record: LayerRecord) -> None:
    """An equal record is there after a migration that was interrupted."""
    own = store.load(layer)
    if own is not None and encode_layer(own) != encode_layer(record):
        raise RecordCorrupt(
            path,
            f"layer {file_name(layer)!r} also has the record"
            f" {str(store.directory / file_name(layer))!r}, which says something else",
        )
