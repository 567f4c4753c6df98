"""Deletions that are put off, deferred removal, and the worker that completes what is left."""

import gc
import json
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from devmapper.deviceset.deletion import Deletion
from devmapper.deviceset.names import LayerId
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.steps import Step
from devmapper.engine.port import Activation
from devmapper.errors import (
    EngineError,
    EnvironmentLacking,
    LayerBusy,
    LayerExists,
    LayerNotFound,
    PoolFull,
    PoolMismatch,
    PoolUnusable,
    Space,
    ThinBusy,
)
from devmapper.units import Bytes, ThinId
from tests.support.graphs import check_consistent, hold_open, open_small, records
from tests.support.local_engine import LocalEngine, LocalPool

DEFERRED = ("dm.use_deferred_removal=true", "dm.use_deferred_deletion=true")
REMOVAL = DEFERRED[:1]


@pytest.fixture
def engine():
    engine = LocalEngine(deferred_removal=True)
    yield engine
    engine.crash()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "graph"


def state_of(pool: LocalPool, name: str) -> Activation:
    info = pool.info(name)
    return Activation.ABSENT if info is None else info.state


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "deferred deletion"]


class Commits:
    """A checkpoint that lets a test wait for a transaction of another thread."""

    def __init__(self) -> None:
        self.came = threading.Event()

    def __call__(self, step: Step) -> None:
        if step is Step.COMMITTED:
            self.came.set()


# A deletion that is put off


@pytest.mark.parametrize("discard", ["true", "false"])
def test_a_layer_in_use_is_gone_for_everybody_at_once(home, engine, discard, tmp_path):
    with open_small(home, engine, *DEFERRED, f"dm.blkdiscard={discard}") as devices:
        devices.add_device("one", "")
        name = devices.dev_info("one").name()
        pool = hold_open(devices, engine, "one")
        assert devices.delete_device("one") is Deletion.PUT_OFF
        assert records(home)["one"]["deleted"] is True
        assert state_of(pool, name) is Activation.LEAVING
        assert pool.calls["discard_device"] == 0, "never under somebody's feet"
        assert not devices.has_device("one")
        assert devices.list() == [""]
        assert devices.meta_data().devices["one"].deleted
        for use in (
            lambda: devices.delete_device("one"),
            lambda: devices.add_device("two", "one"),
            lambda: devices.mount_device("one", tmp_path),
            lambda: devices.unmount_device("one"),
            lambda: devices.get_device_status("one"),
            lambda: devices.dev_info("one"),
        ):
            with pytest.raises(LayerNotFound):
                use()
        with pytest.raises(LayerExists, match="is being deleted, and its device is still in use"):
            devices.add_device("one", "")
        assert devices.status().deferred_deleted_count == 1
        check_consistent(home, devices)
        pool.in_use.clear()
        devices.add_device("one", "")  # nobody has to wait for the worker
        assert not records(home)["one"]["deleted"]
        assert devices.status().deferred_deleted_count == 0
        assert pool.calls["discard_device"] == (discard == "true")
        check_consistent(home, devices)


@pytest.mark.parametrize("options", [(), REMOVAL])
@pytest.mark.parametrize("state", [Activation.ACTIVE, Activation.LEAVING])
def test_without_the_option_a_layer_in_use_stays_as_it_was(home, engine, options, state):
    with open_small(home, engine, *options) as devices:
        devices.add_device("one", "")
        pool = hold_open(devices, engine, "one")
        name = devices.dev_info("one").name()
        if state is Activation.LEAVING:
            pool.deactivate(name, deferred=True)
        before = records(home)
        with pytest.raises(LayerBusy):
            devices.delete_device("one")
        assert records(home) == before
        assert state_of(pool, name) is state
        pool.in_use.clear()
        assert devices.delete_device("one") is Deletion.DONE
        check_consistent(home, devices)


@pytest.mark.parametrize("discard", ["true", "false"])
def test_a_layer_that_nobody_uses_is_deleted_at_once(home, engine, discard):
    with open_small(home, engine, *DEFERRED, f"dm.blkdiscard={discard}") as devices:
        devices.add_device("one", "")
        assert devices.delete_device("one") is Deletion.DONE
        assert set(records(home)) == {"base"}
        check_consistent(home, devices)


def test_a_program_that_has_the_device_open_puts_it_off_too(home, engine):
    """No engine can see it before it tries."""
    with open_small(home, engine, *DEFERRED) as devices:
        devices.add_device("one", "")
        info = devices.dev_info("one")
        (pool,) = engine.pools.values()
        pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        pool.opened.add(info.name())
        assert devices.delete_device("one") is Deletion.PUT_OFF
        pool.opened.clear()
        devices.shutdown()
    with open_small(home, engine) as devices:
        assert set(records(home)) == {"base"}
        check_consistent(home, devices)


def test_the_next_start_completes_it_whatever_its_options(home, engine):
    with open_small(home, engine, *DEFERRED) as devices:
        devices.add_device("one", "")
        devices.add_device("two", "")
        pool = hold_open(devices, engine, "one")
        devices.delete_device("one")
    with open_small(home, engine) as devices:
        assert records(home)["one"]["deleted"], "still in use"
        assert devices.list() == ["", "two"]
        pool.in_use.clear()
    with open_small(home, engine) as devices:
        assert set(records(home)) == {"base", "two"}
        check_consistent(home, devices)


def test_shutdown_completes_it(home, engine):
    devices = open_small(home, engine, *DEFERRED)
    devices.add_device("one", "")
    pool = hold_open(devices, engine, "one")
    devices.delete_device("one")
    pool.in_use.clear()
    devices.shutdown()
    assert set(records(home)) == {"base"}
    assert workers() == []


def test_a_pool_that_takes_no_writes_can_still_be_opened(home, engine):
    with open_small(home, engine, *DEFERRED) as devices:
        devices.add_device("one", "")
        pool = hold_open(devices, engine, "one")
        devices.delete_device("one")
    pool.in_use.clear()
    pool.broken["delete"] = PoolUnusable("ro")
    with open_small(home, engine) as devices:
        assert devices.list() == [""]
    pool.broken.clear()
    with open_small(home, engine) as devices:
        assert set(records(home)) == {"base"}
        check_consistent(home, devices)


# The worker


def test_the_worker_completes_it_on_a_new_pool_too(home, engine):
    """moby starts its worker only for a pool that was there before."""
    commits = Commits()
    with open_small(home, engine, *DEFERRED, checkpoint=commits, deletion_interval=0.01) as devices:
        devices.add_device("one", "")
        pool = hold_open(devices, engine, "one")
        devices.delete_device("one")
        commits.came.clear()
        pool.in_use.clear()
        assert commits.came.wait(60)
        devices.close()
    assert set(records(home)) == {"base"}
    assert workers() == []


def test_one_layer_that_cannot_be_deleted_does_not_keep_the_others(home, engine):
    commits = Commits()
    with open_small(home, engine, *DEFERRED, checkpoint=commits, deletion_interval=0.01) as devices:
        (pool,) = engine.pools.values()
        for layer in ("a", "b", "c"):
            devices.add_device(layer, "")
            hold_open(devices, engine, layer)
            assert devices.delete_device(layer) is Deletion.PUT_OFF
        commits.came.clear()
        damaged = home / "metadata" / "b"
        good = damaged.read_bytes()
        damaged.write_bytes(b"{")
        pool.in_use = {name for name in pool.in_use if not name.endswith("-c")}
        assert commits.came.wait(60)
        devices.close()
        damaged.write_bytes(good)
    assert set(records(home)) == {"base", "a", "b"}


def test_the_worker_sees_what_another_process_has_put_off(home, engine):
    commits = Commits()
    daemon = open_small(home, engine, *DEFERRED, checkpoint=commits, deletion_interval=0.01)
    with daemon, open_small(home, engine, *DEFERRED) as command:
        commits.came.clear()
        command.add_device("one", "")
        pool = hold_open(command, engine, "one")
        command.delete_device("one")
        command.close()
        pool.in_use.clear()
        assert commits.came.wait(60)
        daemon.close()
    assert set(records(home)) == {"base"}


def test_a_worker_that_waits_ends_at_once(home, engine):
    with open_small(home, engine, *DEFERRED, deletion_interval=3600):
        assert len(workers()) == 1
    assert workers() == []


def test_the_worker_goes_on_after_a_shutdown_that_failed(home, engine):
    commits = Commits()
    with open_small(home, engine, *DEFERRED, checkpoint=commits, deletion_interval=0.01) as devices:
        devices.add_device("one", "")
        pool = hold_open(devices, engine, "one")
        devices.delete_device("one")
        with pytest.raises(LayerBusy):
            devices.shutdown()
        commits.came.clear()
        pool.in_use.clear()
        assert commits.came.wait(60)
    assert set(records(home)) == {"base"}


def test_without_something_to_do_there_is_no_worker(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        devices.delete_device("one")
        assert workers() == []


def test_a_graph_that_nobody_closes_leaves_no_worker(home, engine):
    devices = open_small(home, engine, *DEFERRED, deletion_interval=3600)
    (worker,) = workers()
    del devices
    gc.collect()
    worker.join(60)
    assert not worker.is_alive()


def test_records_are_read_again_only_after_a_change(home, engine, monkeypatch):
    with open_small(home, engine, *DEFERRED) as devices:
        devices.add_device("one", "")
        store = devices._graph.store
        read = []
        load = store.load

        def counting(layer: LayerId) -> LayerRecord | None:
            read.append(layer)
            return load(layer)

        monkeypatch.setattr(store, "load", counting)
        os.utime(store.directory, (1, 1))
        assert devices._deletions.doomed() == []
        assert read == ["one"]
        assert devices._deletions.doomed() == []
        assert read == ["one"]
        hold_open(devices, engine, "one")
        devices.delete_device("one")
        assert devices._deletions.doomed() == ["one"]


# Nobody waits with the lock


def test_others_work_while_a_deletion_waits(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        info = devices.dev_info("one")
        (pool,) = engine.pools.values()
        pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        pool.opened.add(info.name())
        ended = []
        thread = threading.Thread(target=lambda: ended.append(devices.delete_device("one")))
        thread.start()
        with open_small(home, engine) as other:
            other.add_device("two", "")
        devices.add_device("three", "two")
        assert ended == []
        pool.opened.clear()
        thread.join()
        assert ended == [Deletion.DONE]
        assert devices.list() == ["", "three", "two"]
        check_consistent(home, devices)


# Deferred removal


def test_the_snapshot_of_a_parent_that_is_leaving(home, engine):
    with open_small(home, engine, *REMOVAL) as devices:
        devices.add_device("one", "")
        name = devices.dev_info("one").name()
        pool = hold_open(devices, engine, "one")
        pool.deactivate(name, deferred=True)
        devices.add_device("two", "one")
        assert pool.suspensions == [name]
        assert state_of(pool, name) is Activation.LEAVING
        pool.broken["create_snap"] = PoolFull(Space.DATA, free=0)
        with pytest.raises(PoolFull):
            devices.add_device("three", "one")
        assert state_of(pool, name) is Activation.LEAVING
        pool.broken.clear()
        pool.in_use.clear()
        assert state_of(pool, name) is Activation.ABSENT
        check_consistent(home, devices)


def test_a_parent_that_was_let_go_of_just_now(home, engine, monkeypatch):
    """A put needs no graph's lock, so it may come between two questions of ours."""
    with open_small(home, engine, *REMOVAL) as devices:
        devices.add_device("one", "")
        name = devices.dev_info("one").name()
        pool = hold_open(devices, engine, "one")
        suspended = pool.suspended

        def late(name: str) -> AbstractContextManager[None]:
            monkeypatch.undo()
            pool.deactivate(name, deferred=True)
            return suspended(name)

        monkeypatch.setattr(pool, "suspended", late)
        devices.add_device("two", "one")
        assert pool.suspensions == [name]
        assert state_of(pool, name) is Activation.LEAVING


def test_a_snapshot_counts_although_its_parent_does_not_leave_again(home, engine, caplog):
    with open_small(home, engine, *REMOVAL) as devices:
        devices.add_device("one", "")
        name = devices.dev_info("one").name()
        pool = hold_open(devices, engine, "one")
        pool.deactivate(name, deferred=True)
        pool.broken["deactivate"] = ThinBusy(name)
        devices.add_device("two", "one")
        pool.broken.clear()
        assert devices.has_device("two")
        assert "stays active" in caplog.text


def test_a_parent_that_cannot_be_resumed_is_no_success(home, engine, monkeypatch):
    """moby ignores it, and the parent stays suspended without a word."""

    @contextmanager
    def suspended(name: str) -> Iterator[None]:
        yield
        raise EngineError(f"{name} is not resumed")

    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        pool = hold_open(devices, engine, "one")
        monkeypatch.setattr(pool, "suspended", suspended)
        with pytest.raises(EngineError, match="is not resumed"):
            devices.add_device("two", "one")
        assert not devices.has_device("two")
        monkeypatch.undo()
        check_consistent(home, devices)
        devices.add_device("two", "one")


def test_deferred_removal_is_refused_where_the_engine_lacks_it(home):
    """Also where the pool is active already; moby 1.7 turns it off silently."""
    engine = LocalEngine()
    with pytest.raises(EnvironmentLacking, match="no deferred removal"):
        open_small(home, engine, *REMOVAL)
    assert not (home / "devicemapper").exists()
    with open_small(home, engine) as devices:
        before = records(home)
        for options in (REMOVAL, DEFERRED):
            with pytest.raises(EnvironmentLacking, match="no deferred removal"):
                open_small(home, engine, *options)
        assert records(home) == before
        assert devices.pool is engine.find_pool(devices.status().pool_name)
    engine.crash()


# Records and pool that disagree


def test_a_layer_whose_thin_device_is_missing_says_so_when_it_is_used(home, engine, tmp_path):
    with open_small(home, engine) as devices:
        for layer in ("one", "two"):
            devices.add_device(layer, "")
        devices.pool.delete(ThinId(2))
        devices.pool.commit()
    before = records(home)
    with open_small(home, engine) as devices:
        for use in (
            lambda: devices.add_device("x", "one"),
            lambda: devices.mount_device("one", tmp_path),
            lambda: devices.get_device_status("one"),
        ):
            with pytest.raises(PoolMismatch, match="layer 'one': its thin id 2 is not in the pool"):
                use()
        assert records(home) == before
        devices.add_device("three", "two")
        found = devices.consistency()
        assert found.missing == {"one": 2}
        assert found.unknown == ()
        assert devices.delete_device("one") is Deletion.DONE
        check_consistent(home, devices)


def test_two_layers_with_one_thin_id_are_reported(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("one", "")
        path = home / "metadata" / "one"
        (home / "metadata" / "copy").write_bytes(path.read_bytes())
        assert list(devices.inconsistencies()) == ["layers 'copy', 'one' have the same thin id 2"]


# Room in the pool


def free_space(engine: LocalEngine, **blocks: int) -> None:
    """Let the pool's status show so many blocks."""
    (pool,) = engine.pools.values()
    status = pool.status
    pool.status = lambda: status()._replace(**blocks)  # type: ignore[method-assign, arg-type]


@pytest.mark.parametrize(
    ("option", "blocks", "refused"),
    [
        ("10%", {"used_data_blocks": 90}, None),
        ("10%", {"used_data_blocks": 91}, (Space.DATA, 9, 10)),
        ("10%", {"used_metadata_blocks": 181}, (Space.METADATA, 19, 20)),
        ("10%", {"used_metadata_blocks": 180}, None),
        ("0%", {"used_data_blocks": 100, "used_metadata_blocks": 200}, None),
        ("1%", {"used_data_blocks": 99}, None),
        ("1%", {"used_data_blocks": 9, "total_data_blocks": 9}, (Space.DATA, 0, 1)),
    ],
)
def test_a_layer_is_made_while_enough_is_free(home, engine, option, blocks, refused):
    with open_small(home, engine, f"dm.min_free_space={option}") as devices:
        total = {"total_data_blocks": 100, "total_metadata_blocks": 200}
        free_space(engine, **{**total, "used_data_blocks": 0, "used_metadata_blocks": 0, **blocks})
        before = records(home), (home / "metadata" / "transaction-metadata").read_bytes()
        if refused is None:
            devices.add_device("one", "")
            return
        with pytest.raises(PoolFull) as caught:
            devices.add_device("one", "")
        assert (caught.value.kind, caught.value.free, caught.value.needed) == refused
        assert f"dm.min_free_space={option}" in caught.value.hint
        after = records(home), (home / "metadata" / "transaction-metadata").read_bytes()
        assert after == before
        assert devices.pool.thin_ids() == [1]


def test_the_base_layer_needs_room_too(home, engine, monkeypatch):
    with open_small(home, engine) as devices:
        devices.shutdown()
    record = json.loads((home / "metadata" / "base").read_bytes())
    (home / "metadata" / "base").write_text(json.dumps({**record, "initialized": False}))
    status = LocalPool.status
    monkeypatch.setattr(
        LocalPool,
        "status",
        lambda pool: status(pool)._replace(used_data_blocks=status(pool).total_data_blocks),
    )
    with pytest.raises(PoolFull):
        open_small(home, engine)
    monkeypatch.undo()
    with open_small(home, engine) as devices:
        check_consistent(home, devices)


# A thousand layers


def test_the_work_for_a_layer_does_not_grow_with_their_number(home, engine, monkeypatch):
    """Counted: records read and questions to the pool, for making, using and deleting one."""
    import devmapper.deviceset.records as module

    read: list[Path] = []
    read_fields = module.read_fields

    def counting(path: Path, **limits: int) -> object:
        read.append(path)
        return read_fields(path, **limits)

    monkeypatch.setattr(module, "read_fields", counting)
    with (
        open_small(home, engine, "dm.min_free_space=0%") as devices,
        open_small(home, engine, "dm.min_free_space=0%") as other,
    ):
        (pool,) = engine.pools.values()

        def work(number: int) -> tuple[int, dict[str, int]]:
            """With another process on the same graph, which moves the transaction id."""
            read.clear()
            pool.calls.clear()
            devices.add_device(f"a{number}", "")
            other.add_device(f"b{number}", f"a{number}")
            devices.get_device_status(f"b{number}")
            devices.delete_device(f"b{number}")
            other.add_device(f"c{number}", f"a{number}")
            return len(read), dict(pool.calls)

        work(0)
        few = work(1)
        for number in range(2, 20):
            work(number)
        assert work(20) == few
        assert few[1].get("thin_ids", 0) == 0
        check_consistent(home, devices)
