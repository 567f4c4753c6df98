"""Transactions and recovery: whatever step is the last one, nothing leaks and nothing is lost."""

import json
import threading
from pathlib import Path

import pytest

from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.keyed_lock import KeyedLock
from devmapper.deviceset.records import RecordStore, TransactionRecord
from devmapper.deviceset.steps import Step
from devmapper.deviceset.transaction import Finding, compare
from devmapper.errors import (
    GraphLocked,
    LayerBusy,
    LayerExists,
    LayerNotFound,
    PoolFull,
    PoolMismatch,
    PoolNotFound,
    RecordCorrupt,
    Space,
    ThinBusy,
    TransactionConflict,
    UsageError,
)
from devmapper.linux.files import FileLock
from devmapper.units import MIB, Bytes, ThinId, TransactionId
from tests.support.graphs import CrashAt, SimulatedCrash, check_consistent, open_small, records
from tests.support.local_engine import LocalEngine


@pytest.fixture
def engine():
    engine = LocalEngine()
    yield engine
    engine.crash()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "graph"


def transaction_of(home: Path) -> dict[str, object] | None:
    path = home / "metadata" / "transaction-metadata"
    if not path.exists():
        return None
    found: dict[str, object] = json.loads(path.read_bytes())
    return found


def test_ids_are_compared_as_the_table_says():
    pool = TransactionId(7)
    assert compare(pool, None) is Finding.CLEAN
    assert compare(pool, TransactionId(7)) is Finding.CLEAN
    assert compare(pool, TransactionId(8)) is Finding.INTERRUPTED
    assert compare(pool, TransactionId(6)) is Finding.CONFLICT
    assert compare(pool, TransactionId(9)) is Finding.CONFLICT


def test_a_new_graph_looks_like_dockers(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.add_device("two", "one")
        check_consistent(home, devices)
        assert devices.list() == ["", "one", "two"]
    found = records(home)
    assert found["base"] == {
        "device_id": 1,
        "size": 8 * MIB,
        "transaction_id": 1,
        "initialized": True,
        "deleted": False,
    }
    assert [found[name]["device_id"] for name in ("one", "two")] == [2, 3]
    assert [found[name]["transaction_id"] for name in ("one", "two")] == [2, 3]
    assert not found["two"]["initialized"]
    assert transaction_of(home) == {
        "open_transaction_id": 3,
        "device_hash": "two",
        "device_id": 3,
    }
    stored = json.loads((home / "metadata" / "deviceset-metadata").read_bytes())
    assert stored["next_device_id"] == 3
    assert stored["BaseDeviceFilesystem"] == "ext4"
    assert len(stored["BaseDeviceUUID"]) == 36
    modes = {
        name: (home / name).stat().st_mode & 0o777
        for name in ("devicemapper", "metadata", "devicemapper/data", "devicemapper/metadata")
    }
    assert modes == {
        "devicemapper": 0o700,
        "metadata": 0o700,
        "devicemapper/data": 0o600,
        "devicemapper/metadata": 0o600,
    }


def test_a_graph_is_opened_again(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.shutdown()
    assert engine.pools == {}
    with open_small(home, engine) as devices:
        assert devices.list() == ["", "one"]
        devices.add_device("two", "one")
        assert devices.dev_info("two").device_id == 3
        assert devices.dev_info("two").name().endswith("-two")
        assert devices.dev_info("").dev_name().startswith("/dev/mapper/docker-")
        check_consistent(home, devices)


def test_errors_of_create_and_delete_change_nothing(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        before = records(home), transaction_of(home)
        with pytest.raises(LayerExists):
            devices.add_device("one", "")
        with pytest.raises(LayerNotFound):
            devices.add_device("two", "nobody")
        with pytest.raises(LayerNotFound):
            devices.delete_device("nobody")
        with pytest.raises(UsageError):
            devices.add_device("../two", "")
        with pytest.raises(UsageError):
            devices.add_device("two", "", size=123)
        assert (records(home), transaction_of(home)) == before
        check_consistent(home, devices)


def test_a_creation_that_fails_is_taken_back(home, engine):
    with open_small(home, engine) as devices:
        pool = next(iter(engine.pools.values()))
        for method in ("create_snap", "set_transaction_id"):
            pool.broken[method] = PoolFull(Space.METADATA, free=0)
            with pytest.raises(PoolFull):
                devices.add_device("one", "")
            pool.broken.clear()
            assert set(records(home)) == {"base"}
            assert transaction_of(home) is None
            check_consistent(home, devices)
        devices.add_device("one", "")
        assert devices.list() == ["", "one"]


def test_a_deletion_that_failed_is_not_carried_out_at_the_next_start(home, engine):
    """moby leaves the intent behind, and its next start deletes the layer after all."""
    with open_small(home, engine, "dm.blkdiscard=false") as devices:
        devices.add_device("one", "")
        pool = next(iter(engine.pools.values()))
        pool.broken["delete"] = ThinBusy("one")
        with pytest.raises(ThinBusy):
            devices.delete_device("one")
        pool.broken.clear()
    engine.crash()
    with open_small(home, engine) as devices:
        assert devices.has_device("one")
        check_consistent(home, devices)


def test_a_layer_in_use_is_busy_at_once_and_stays(home, engine):
    for option in ("dm.blkdiscard=true", "dm.blkdiscard=false"):
        with open_small(home, engine, option) as devices:
            if not devices.has_device("one"):
                devices.add_device("one", "")
            info = devices.dev_info("one")
            pool = next(iter(engine.pools.values()))
            pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
            pool.in_use.add(info.name())
            with pytest.raises(LayerBusy):
                devices.delete_device("one")
            assert devices.has_device("one")
            assert not records(home)["one"]["deleted"]
            pool.in_use.clear()
            check_consistent(home, devices)


@pytest.mark.parametrize("discard", ["true", "false"])
def test_an_active_layer_that_nobody_uses_is_deleted(home, engine, discard):
    with open_small(home, engine, f"dm.blkdiscard={discard}") as devices:
        devices.add_device("one", "")
        info = devices.dev_info("one")
        devices.pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        assert devices.has_activated_device("one")
        devices.delete_device("one")
        assert devices.list() == [""]
        assert devices.pool.devices() == []
        check_consistent(home, devices)


def test_an_active_parent_is_suspended_and_another_is_not(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        info = devices.dev_info("one")
        pool = next(iter(engine.pools.values()))
        devices.add_device("two", "one")
        assert pool.suspensions == []
        pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        devices.add_device("three", "one")
        assert pool.suspensions == [info.name()]


def test_the_transaction_files_id_is_not_reserved(home, engine):
    """moby 1.7 takes the transaction file for a device."""
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.delete_device("one")
        devices.shutdown()
    store = RecordStore(home / "metadata")
    store.save_deviceset(store.load_deviceset()._replace(next_device_id=1))
    with open_small(home, engine) as devices:
        devices.add_device("two", "")
        assert devices.dev_info("two").device_id == 2


def test_thin_ids_that_no_layer_has_are_reported_and_never_given_out(home, engine):
    with open_small(home, engine) as devices:
        pool = next(iter(engine.pools.values()))
        pool.create_thin(ThinId(2))
        pool.commit()
        devices.add_device("one", "")
        assert devices.dev_info("one").device_id == 3
        assert 2 in devices.pool.thin_ids()
        assert list(devices.inconsistencies()) == ["thin id 2 is in the pool, but no layer has it"]


def test_a_record_whose_thin_device_is_gone_is_reported_and_kept(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.pool.delete(ThinId(2))
        devices.pool.commit()
        (line,) = devices.inconsistencies()
        assert line == "layer 'one': its thin id 2 is not in the pool"
    with open_small(home, engine) as devices:
        assert devices.has_device("one")
        devices.delete_device("one")
        assert not devices.has_device("one")
        check_consistent(home, devices)


@pytest.mark.parametrize("open_id", [0, 1, 4, 99])
def test_a_transaction_id_that_does_not_fit_is_refused(home, engine, open_id):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.shutdown()
    store = RecordStore(home / "metadata")
    intent = store.load_transaction()
    assert intent is not None
    store.save_transaction(TransactionRecord(TransactionId(open_id), intent.layer, intent.thin_id))
    before = records(home)
    with pytest.raises(TransactionConflict):
        open_small(home, engine)
    assert records(home) == before
    assert engine.pools == {}, "a failed start lets go of the pool again"


def test_damaged_records_stop_the_start_and_stay(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.shutdown()
    for name in ("one", "transaction-metadata", "deviceset-metadata"):
        path = home / "metadata" / name
        good = path.read_bytes()
        path.write_bytes(good[:-4])
        with pytest.raises(RecordCorrupt, match=name):
            open_small(home, engine)
        assert path.read_bytes() == good[:-4]
        path.write_bytes(good)
    with open_small(home, engine) as devices:
        assert devices.has_device("one")


def test_another_graphs_pool_is_refused(home, engine, tmp_path):
    with open_small(home, engine) as devices:
        devices.shutdown()
    other = tmp_path / "other"
    with open_small(other, engine) as devices:
        devices.shutdown()
    for name in ("data", "metadata"):
        (other / "devicemapper" / name).rename(home / "devicemapper" / name)
    # the engine of these tests keeps what its devices hold beside the data file
    (home / "devicemapper" / "contents").rename(tmp_path / "kept")
    (other / "devicemapper" / "contents").rename(home / "devicemapper" / "contents")
    with pytest.raises(PoolMismatch, match="UUID"):
        open_small(home, engine)


@pytest.mark.parametrize("lost", [["data"], ["metadata"], ["data", "metadata"]])
def test_a_lost_loop_file_is_not_made_anew(home, engine, lost):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.shutdown()
    for name in lost:
        (home / "devicemapper" / name).unlink()
    with pytest.raises(PoolMismatch, match="does not exist"):
        open_small(home, engine)
    assert [n for n in lost if (home / "devicemapper" / n).exists()] == []


def test_blank_metadata_under_layers_are_refused(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.shutdown()
    metadata = home / "devicemapper" / "metadata"
    metadata.write_bytes(bytes(metadata.stat().st_size))
    with pytest.raises(PoolMismatch, match="blank"):
        open_small(home, engine)
    assert not any(metadata.read_bytes())


def test_the_block_size_is_read_back(home, engine):
    with open_small(home, engine, "dm.blocksize=128K") as devices:
        devices.shutdown()
    with open_small(home, engine) as devices:
        assert devices.pool.status().block_size == 128 * 1024
        devices.shutdown()
    with pytest.raises(PoolMismatch, match=r"dm\.blocksize"):
        open_small(home, engine, "dm.blocksize=64K")


def test_without_initialisation_a_graph_must_be_there(home, engine):
    with pytest.raises(PoolNotFound):
        DeviceSet(home, engine=engine, do_init=False)
    assert not home.exists()
    home.mkdir()
    with pytest.raises(PoolNotFound):
        DeviceSet(home, engine=engine, do_init=False)
    assert list(home.iterdir()) == []


def test_resize_grows_and_never_shrinks(home, engine):
    with open_small(home, engine) as devices:
        devices.resize_pool(8 * MIB)
        assert devices.pool.status().total_data_blocks == 8 * 16
        assert (home / "devicemapper" / "data").stat().st_size == 8 * MIB
        devices.resize_pool(8 * MIB)
        with pytest.raises(UsageError, match="cannot shrink"):
            devices.resize_pool(4 * MIB)
        check_consistent(home, devices)


def test_two_open_graphs_see_each_others_work(home, engine):
    with open_small(home, engine) as one, open_small(home, engine) as other:
        for number in range(4):
            (one, other)[number % 2].add_device(f"layer{number}", "")
        other.delete_device("layer0")
        assert one.list() == other.list() == ["", "layer1", "layer2", "layer3"]
        with pytest.raises(LayerNotFound):
            one.add_device("x", "layer0")
        one.add_device("layer0", "layer3")
        check_consistent(home, one)


def test_many_threads_make_and_delete_layers(home, engine):
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(3):
                devices.add_device(f"{number}-{turn}", "")
            devices.delete_device(f"{number}-1")
        except BaseException as err:
            errors.append(err)

    with open_small(home, engine) as devices:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(devices.list()) == 1 + 4 * 2
        check_consistent(home, devices)


def test_a_locked_graph_names_the_holder(home, engine, monkeypatch):
    with open_small(home, engine) as devices:
        monkeypatch.setattr(devices._graph.lock, "_timeout", 0.1)
        with FileLock(home / "lock"), pytest.raises(GraphLocked, match="process"):
            devices.add_device("one", "")
        devices.add_device("one", "")


def test_keyed_locks_exclude_by_key_and_vanish():
    locks: KeyedLock[str] = KeyedLock()
    entered = threading.Event()
    done = threading.Event()

    def other() -> None:
        with locks.hold("b", "a", "a"):
            entered.set()
        done.set()

    thread = threading.Thread(target=other)
    with locks.hold("a"):
        thread.start()
        with locks.hold("c"):
            assert not entered.wait(0.05)
    assert done.wait(60)
    thread.join()
    assert locks._entries == {}


@pytest.mark.parametrize("step", [Step.INTENT_WRITTEN, Step.THIN_CREATED, Step.RECORD_SAVED])
def test_an_interrupted_creation_is_undone_by_another_process_too(home, engine, step):
    """The pool lives on in the engine; only the command died."""
    with open_small(home, engine) as other:
        crash = CrashAt(step)
        with pytest.raises(SimulatedCrash):
            open_small(home, engine, checkpoint=crash).add_device("one", "")
        other.add_device("two", "")
        assert other.list() == ["", "two"]
        check_consistent(home, other)


def test_an_interrupted_deletion_of_a_busy_layer_dooms_it(home, engine):
    with open_small(home, engine, "dm.blkdiscard=false") as devices:
        devices.add_device("one", "")
        info = devices.dev_info("one")
    crash = CrashAt(Step.INTENT_WRITTEN)
    with pytest.raises(SimulatedCrash):
        open_small(home, engine, "dm.blkdiscard=false", checkpoint=crash).delete_device("one")
    pool = next(iter(engine.pools.values()))
    pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
    pool.in_use.add(info.name())
    with open_small(home, engine) as devices:
        assert not devices.has_device("one")
        assert records(home)["one"]["deleted"]
        with pytest.raises(LayerExists):
            devices.add_device("one", "")
        check_consistent(home, devices)
    pool.in_use.clear()
    with open_small(home, engine) as devices:
        assert "one" not in records(home)
        devices.add_device("one", "")
        check_consistent(home, devices)
