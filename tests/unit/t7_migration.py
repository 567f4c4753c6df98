"""The one file of early Docker versions becomes a record for each layer, or nothing changes."""

import json
import os
import shutil
from pathlib import Path

import pytest

from devmapper.deviceset.records import RecordStore
from devmapper.errors import PoolMismatch, RecordCorrupt
from tests.support.graphs import check_consistent, make_legacy, make_two_layers, open_small, records
from tests.support.local_engine import LocalEngine


@pytest.fixture
def engine():
    engine = LocalEngine()
    yield engine
    engine.crash()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_two_layers(tmp_path_factory.mktemp("template"))


@pytest.fixture
def home(template, tmp_path):
    """A graph as early Docker versions left it."""
    home = Path(shutil.copytree(template, tmp_path / "graph"))
    home.joinpath("expected").write_text(json.dumps(make_legacy(home)))
    return home


def legacy_of(home: Path) -> dict[str, dict[str, dict[str, object]]]:
    found: dict[str, dict[str, dict[str, object]]] = json.loads(
        (home / "devicemapper" / "json").read_bytes()
    )
    return found


def write_legacy(home: Path, value: object) -> None:
    (home / "devicemapper" / "json").write_text(json.dumps(value))


def state(home: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(home)): path.read_bytes()
        for folder in ("metadata", "devicemapper")
        for path in (home / folder).iterdir()
        if path.is_file()
    }


def test_layers_are_taken_over_and_the_file_is_kept_under_another_name(home, engine):
    expected = json.loads((home / "expected").read_bytes())
    before = (home / "devicemapper" / "json").read_bytes()
    with open_small(home, engine) as devices:
        assert devices.list() == ["", "one", "two"]
        assert records(home) == expected
        assert (home / "devicemapper" / "json.migrated").read_bytes() == before
        assert not (home / "devicemapper" / "json").exists()
        check_consistent(home, devices)
        devices.add_device("three", "two")
        assert devices.dev_info("three").device_id == 4
        devices.shutdown()
    with open_small(home, engine) as devices:
        assert devices.list() == ["", "one", "three", "two"]


def test_each_record_is_durable_before_the_file_is_renamed_and_the_new_name_afterwards(
    home, engine, monkeypatch
):
    synced: list[tuple[str, bool]] = []
    legacy = home / "devicemapper" / "json"
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.append((os.readlink(f"/proc/self/fd/{fd}"), legacy.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with open_small(home, engine):
        monkeypatch.undo()
    metadata, devicemapper = str(home / "metadata"), str(home / "devicemapper")
    assert synced.count((metadata, True)) == 3
    assert sum(Path(name).name.startswith(".tmp") for name, before in synced if before) == 3
    assert (devicemapper, False) in synced


def test_an_empty_file_of_layers_is_no_obstacle_to_a_new_graph(tmp_path, engine):
    (tmp_path / "devicemapper").mkdir()
    write_legacy(tmp_path, {"Devices": {}})
    with open_small(tmp_path, engine) as devices:
        assert devices.list() == [""]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda old: old["one"].pop("device_id"), "'one': 'device_id' is missing"),
        (lambda old: old["one"].update(size=-1), "'size' is -1"),
        (lambda old: old["one"].update(device_id=2**24), "'device_id'"),
        (lambda old: old["one"].update(device_id=1), "both have thin id 1"),
        (lambda old: old.update(one=None), "'one' is no JSON object"),
        (lambda old: old.update({"../escape": old["one"]}), "contains '/'"),
        (lambda old: old.update({"transaction-metadata": old["one"]}), "reserved"),
        (lambda old: old.update({"base": old["one"]}), "reserved"),
    ],
)
def test_what_cannot_be_taken_over_stops_the_start_and_changes_nothing(
    home, engine, change, reason
):
    whole = legacy_of(home)
    change(whole["Devices"])
    write_legacy(home, whole)
    before = state(home)
    with pytest.raises(RecordCorrupt, match=reason):
        open_small(home, engine)
    assert state(home) == before
    assert engine.pools == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"Devices":[]}', '{"Devices":null}']
)
def test_a_damaged_file_stops_the_start_and_changes_nothing(home, engine, text):
    (home / "devicemapper" / "json").write_text(text)
    before = state(home)
    with pytest.raises(RecordCorrupt, match="json"):
        open_small(home, engine)
    assert state(home) == before
    assert engine.pools == {}


def test_a_layer_that_has_another_record_already_is_not_decided_about(home, engine):
    expected = json.loads((home / "expected").read_bytes())
    one = dict(expected["one"], size=4096)
    (home / "metadata" / "one").write_text(json.dumps(one))
    before = state(home)
    with pytest.raises(RecordCorrupt, match="says something else"):
        open_small(home, engine)
    assert state(home) == before
    (home / "metadata" / "one").write_text(json.dumps(expected["one"]))
    with open_small(home, engine):
        assert records(home) == expected


def test_an_error_takes_back_what_was_taken_over(home, engine, monkeypatch):
    """moby ignores it and renames the file away: the layer is lost."""
    save = RecordStore.save

    def failing(store: RecordStore, layer: str, record: object) -> None:
        if layer == "two":
            raise OSError(28, "No space left on device")
        save(store, layer, record)  # type: ignore[arg-type]

    before = state(home)
    monkeypatch.setattr(RecordStore, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        open_small(home, engine)
    monkeypatch.undo()
    assert state(home) == before
    assert engine.pools == {}
    with open_small(home, engine) as devices:
        assert devices.list() == ["", "one", "two"]


def test_layers_of_the_file_count_when_the_pool_is_lost(home, engine):
    """moby makes a new, empty pool then."""
    for name in ("data", "metadata"):
        os.unlink(home / "devicemapper" / name)
    before = state(home)
    with pytest.raises(PoolMismatch, match="does not exist"):
        open_small(home, engine)
    assert state(home) == before
