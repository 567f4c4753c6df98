"""Docker's JSON files: byte for byte what dockerd 20.10 wrote, and garbage refused."""

import json
import os

import pytest

from devmapper.deviceset.ids import ThinIds
from devmapper.deviceset.names import BASE, LayerId
from devmapper.deviceset.records import (
    DeviceSetRecord,
    LayerRecord,
    RecordStore,
    TransactionRecord,
)
from devmapper.errors import RecordCorrupt, ThinIdsExhausted
from devmapper.units import Bytes, ThinId, TransactionId

WEB = LayerId("web")
LAYER = b'{"device_id":7,"size":268435456,"transaction_id":9,"initialized":false,"deleted":false}'
DEVICESET = (
    b'{"next_device_id":18,"BaseDeviceUUID":"c8bfcba0-e331-43b8-844c-934eff80724e",'
    b'"BaseDeviceFilesystem":"ext4"}'
)
TRANSACTION = b'{"open_transaction_id":24,"device_hash":"210d994a","device_id":18}'


@pytest.fixture
def store(tmp_path):
    store = RecordStore(tmp_path / "metadata")
    store.prepare()
    return store


def write(store: RecordStore, name: str, raw: bytes) -> None:
    (store.directory / name).write_bytes(raw)


def test_layer_records_are_dockers_bytes(store):
    record = LayerRecord(ThinId(7), Bytes(268435456), TransactionId(9))
    store.save(WEB, record)
    assert (store.directory / "web").read_bytes() == LAYER
    assert store.load(WEB) == record
    assert (store.directory / "web").stat().st_mode & 0o777 == 0o600


def test_the_base_layer_is_spelled_base(store):
    record = LayerRecord(ThinId(1), Bytes(4096), TransactionId(1), initialized=True)
    store.save(BASE, record)
    assert (store.directory / "base").read_bytes().endswith(b'"initialized":true,"deleted":false}')
    assert store.load(BASE) == record


def test_the_other_two_files_are_dockers_bytes(store):
    uuid = "c8bfcba0-e331-43b8-844c-934eff80724e"
    store.save_deviceset(DeviceSetRecord(18, uuid, "ext4"))
    assert (store.directory / "deviceset-metadata").read_bytes() == DEVICESET
    assert store.load_deviceset() == DeviceSetRecord(18, uuid, "ext4")
    transaction = TransactionRecord(TransactionId(24), LayerId("210d994a"), ThinId(18))
    store.save_transaction(transaction)
    assert (store.directory / "transaction-metadata").read_bytes() == TRANSACTION
    assert store.load_transaction() == transaction


def test_missing_files_are_no_error(store):
    assert store.load(WEB) is None
    assert store.load_deviceset() == DeviceSetRecord()
    assert store.load_transaction() is None
    store.remove(WEB)
    store.remove_transaction()


def test_records_of_docker_1_7_have_no_deleted_key(store):
    write(store, "web", b'{"device_id":7,"size":512,"transaction_id":9,"initialized":false}')
    assert store.load(WEB) == LayerRecord(ThinId(7), Bytes(512), TransactionId(9))
    write(store, "deviceset-metadata", b'{"next_device_id":4}')
    assert store.load_deviceset() == DeviceSetRecord(4)


def test_keys_match_as_gos_decoder_matches_them(store):
    write(store, "web", b'{"DEVICE_ID":7,"Size":512,"transaction_id":1,"Transaction_Id":9}')
    assert store.load(WEB) == LayerRecord(ThinId(7), Bytes(512), TransactionId(9))


def test_unknown_keys_survive_a_rewrite(store):
    write(store, "web", LAYER[:-1] + b',"new":{"a":[1,"<\xc3\xbc>"]},"op":"create"}')
    record = store.load(WEB)
    assert record is not None
    store.save(WEB, record._replace(deleted=True))
    raw = (store.directory / "web").read_bytes()
    assert json.loads(raw)["new"] == {"a": [1, "<ü>"]}
    assert raw.endswith(b'"deleted":true,"new":{"a":[1,"\\u003c\xc3\xbc\\u003e"]},"op":"create"}')


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON|nested"),
        (b"null", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{}", "'device_id' is missing"),
        (LAYER.replace(b"7", b'"7"', 1), "'device_id' is '7', expected an integer"),
        (LAYER.replace(b"7", b"7.5", 1), "'device_id' is 7.5"),
        (LAYER.replace(b"7", b"true", 1), "'device_id' is True"),
        (LAYER.replace(b"7", b"-1", 1), "'device_id' is -1"),
        (LAYER.replace(b"7", b"16777216", 1), "'device_id' is 16777216, expected 0 to 16777215"),
        (LAYER.replace(b"268435456", b"99999999999999999999"), "'size'"),
        (LAYER.replace(b"9,", b"18446744073709551616,", 1), "'transaction_id'"),
        (LAYER.replace(b"false", b"0", 1), "'initialized' is 0, expected true or false"),
        (LAYER.replace(b"7", b"9" * 5000, 1), "not JSON|'device_id'"),
        (b" " * (1024**2 + 1), "larger than"),
    ],
)
def test_garbage_is_refused_and_stays(store, raw, reason):
    write(store, "web", raw)
    with pytest.raises(RecordCorrupt, match=reason) as caught:
        store.load(WEB)
    assert str(store.directory / "web") in str(caught.value)
    assert (store.directory / "web").read_bytes() == raw


def test_garbage_in_the_transaction_file_is_refused(store):
    write(store, "transaction-metadata", b'{"device_id":1,"device_hash":""}')
    with pytest.raises(RecordCorrupt, match="open_transaction_id"):
        store.load_transaction()


def test_a_record_that_is_no_file_is_refused_without_waiting_for_it(store):
    os.mkfifo(store.directory / "web")
    with pytest.raises(RecordCorrupt, match="not a regular file"):
        store.load(WEB)


def test_a_scan_skips_what_docker_skips(store):
    write(store, "web", LAYER)
    write(store, "base", LAYER)
    write(store, "deviceset-metadata", DEVICESET)
    write(store, "transaction-metadata", TRANSACTION)
    write(store, "json.migrated", b"{")
    write(store, ".tmp123", b"{")
    (store.directory / "sub").mkdir()
    assert set(store.layers()) == {"", "web"}
    assert set(store.load_all()) == {"", "web"}


def test_leftovers_of_interrupted_writes_are_removed(store):
    write(store, ".tmp123", b"{")
    write(store, "web", LAYER)
    store.prepare()
    assert [path.name for path in store.directory.iterdir()] == ["web"]


def test_a_failed_write_leaves_the_old_record_and_no_temporary_file(store, monkeypatch):
    record = LayerRecord(ThinId(7), Bytes(268435456), TransactionId(9))
    store.save(WEB, record)

    def fail(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        store.save(WEB, record._replace(deleted=True))
    monkeypatch.undo()
    assert store.load(WEB) == record
    assert [path.name for path in store.directory.iterdir()] == ["web"]


def test_ids_go_up_from_the_last_one_and_round():
    ids = ThinIds({1, 2, 5}, 0)
    assert [ids.allocate() for _ in range(3)] == [3, 4, 6]
    ids.free(3)
    assert ids.allocate() == 7
    wrapping = ThinIds({0, 1}, 2**24 - 2)
    assert [wrapping.allocate() for _ in range(2)] == [2**24 - 1, 2]


def test_a_new_graph_gives_its_base_the_id_one():
    assert ThinIds((), 0).allocate() == 1


def test_a_full_pool_is_an_error_and_not_an_endless_loop():
    ids = ThinIds(range(2**24), 5)
    with pytest.raises(ThinIdsExhausted):
        ids.allocate()
    ids.free(4)
    assert ids.allocate() == 4
