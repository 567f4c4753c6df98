"""Pools of the kernel engine: their devices, their table, their growth, who else has them."""

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devmapper.engine.device_lock import device_lock
from devmapper.engine.embedded import opening
from devmapper.engine.kernel import devices
from devmapper.engine.kernel.devices import THIN_FLAGS
from devmapper.engine.kernel.pool import KernelPool
from devmapper.engine.port import Activation, Outcome, PoolMode
from devmapper.errors import FormatError, PoolBusy, PoolMismatch, PoolNotFound, ThinBusy, UsageError
from devmapper.linux import blockdev, dmnode, libdm, loop
from devmapper.linux.libdm import Target
from devmapper.units import MIB, Bytes, Sectors, ThinId
from tests.conformance.engine_suite import make_file_system, mounted, write
from tests.kernel.conftest import POOL, check
from tests.support import capabilities, dm, thin_tools
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kernel

ONE, TWO = ThinId(1), ThinId(2)
SIZE = Bytes(32 * MIB)
ERROR = Target(Sectors(0), Sectors(2048), "error", "")


class TestDevices:
    def test_files_get_loop_devices_that_go_with_the_pool(self, engine, table):
        pool = engine.activate_pool(POOL, table)
        (metadata,) = dm.loops_on(table.metadata_device)
        (data,) = dm.loops_on(table.data_device)
        assert pool.table() == table._replace(metadata_device=metadata, data_device=data)
        again = engine.activate_pool(POOL, table)
        assert again.table() == pool.table()
        assert engine.deactivate_pool(POOL) is Outcome.DONE
        dm.await_no_loops_on(table.metadata_device, table.data_device)
        check(table)

    def test_a_gap_in_the_numbers_of_loop_devices_is_used(self, engine, table, tmp_path):
        for name in ("first", "second"):
            (tmp_path / name).write_bytes(bytes(MIB))
        first = loop.attach(tmp_path / "first", direct_io=False)
        with loop.attached(tmp_path / "second", direct_io=False):
            loop.detach(first, timeout=60)
            pool = engine.activate_pool(POOL, table)
            assert first in (pool.table().metadata_device, pool.table().data_device)
            engine.deactivate_pool(POOL)

    def test_the_table_line_is_mobys(self, pool, table):
        metadata, data = (
            blockdev.device_number(path)
            for path in (pool.table().metadata_device, pool.table().data_device)
        )
        sectors = table.data_size // 512
        expected = f"0 {sectors} thin-pool {metadata} {data} 128 32768 1 skip_block_zeroing"
        assert dm.table_line(POOL) == expected

    def test_every_feature_reaches_the_kernel_and_comes_back(self, engine, table):
        engine.activate_pool(POOL, table)
        engine.deactivate_pool(POOL)  # formatted: a read-only pool cannot be
        odd = table._replace(
            skip_block_zeroing=False,
            error_if_no_space=True,
            ignore_discard=True,
            read_only=True,
            low_water_mark=7,
        )
        pool = engine.activate_pool(POOL, odd)
        found = pool.table()._replace(
            metadata_device=odd.metadata_device, data_device=odd.data_device
        )
        assert found == odd
        status = pool.status()
        assert (status.mode, status.error_if_no_space) == (PoolMode.READ_ONLY, True)
        assert not status.discard_passdown
        engine.deactivate_pool(POOL)
        pool = engine.activate_pool(POOL, table._replace(no_discard_passdown=True))
        assert pool.table().no_discard_passdown
        assert not pool.status().discard_passdown
        engine.deactivate_pool(POOL)

    def test_the_thin_table_line_is_mobys(self, pool):
        pool.create_thin(ONE)
        path = pool.activate("one", ONE, SIZE)
        assert path == Path("/dev/mapper/one")
        number = blockdev.device_number(Path("/dev/mapper") / POOL)
        assert dm.table_line("one") == f"0 {SIZE // 512} thin {number} 1"

    def test_an_activation_that_fails_leaves_no_loop_device(self, engine, table):
        with table.metadata_device.open("r+b") as file:
            file.write(b"no pool" * 1000)
        with pytest.raises(FormatError):
            engine.activate_pool(POOL, table)
        dm.await_no_loops_on(table.metadata_device, table.data_device)
        assert devices.find_state(POOL) is None
        assert engine.deactivate_pool(POOL) is Outcome.ALREADY

    def test_names_that_udev_would_change_are_refused(self, engine, pool, table):
        for name in ("a b", "ü", "a~b"):
            with pytest.raises(UsageError):
                engine.activate_pool(name, table)
            with pytest.raises(UsageError):
                pool.activate(name, ONE, SIZE)

    def test_the_runtime_directory_goes_with_the_pool(self, engine, table, runtime_base):
        pool = engine.activate_pool(POOL, table)
        pool.create_thin(ONE)
        assert pool.thin_ids() == [ONE]
        engine.deactivate_pool(POOL)
        assert [path.name for path in runtime_base.iterdir()] == [f".lock-{POOL}"]

    def test_a_pool_that_is_gone_is_named(self, engine, table):
        pool = engine.activate_pool(POOL, table)
        engine.deactivate_pool(POOL)
        for call in (pool.status, pool.table, pool.thin_ids, pool.devices, pool.commit):
            with pytest.raises(PoolNotFound, match=POOL):
                call()
        with pytest.raises(PoolNotFound):
            pool.create_thin(ONE)
        with pytest.raises(PoolNotFound):
            pool.activate("one", ONE, SIZE)
        assert pool.info("one") is None
        assert devices.find_state("one") is None


class TestOthers:
    """Names and devices that are somebody else's."""

    def test_a_device_that_is_no_pool(self, engine, table):
        devices.create(POOL, ERROR, THIN_FLAGS)
        try:
            with pytest.raises(PoolMismatch, match="no thin pool"):
                engine.find_pool(POOL)
            with pytest.raises(PoolMismatch):
                engine.activate_pool(POOL, table)
            with pytest.raises(PoolMismatch):
                engine.deactivate_pool(POOL)
        finally:
            dm.settle()
            devices.remove(POOL)

    def test_a_device_that_is_not_on_the_pool(self, pool):
        pool.create_thin(ONE)
        pool.create_thin(TWO)
        devices.create("one", ERROR, THIN_FLAGS)
        try:
            with pytest.raises(PoolMismatch, match="no thin device"):
                pool.info("one")
            with pytest.raises(PoolMismatch, match="no thin device"):
                pool.activate("one", ONE, SIZE)
        finally:
            dm.settle()
            devices.remove("one")
        pool.activate("one", ONE, SIZE)
        with pytest.raises(PoolMismatch, match="thin id 1, expected 2"):
            pool.activate("one", TWO, SIZE)

    def test_files_of_an_active_pool_are_busy(self, engine, pool, table):
        with pytest.raises(PoolBusy, match="dm-"):
            engine.activate_pool("other", table)
        with pytest.raises(PoolBusy, match="dm-"), opening.opened(table):
            pytest.fail("the embedded engine took them")
        assert devices.find_state("other") is None

    def test_devices_of_an_active_pool_are_busy(self, engine, pool):
        with pytest.raises(PoolBusy) as busy:
            engine.activate_pool("other", pool.table())
        assert busy.value.metadata_device == pool.table().metadata_device
        with pytest.raises(PoolBusy), opening.opened(pool.table()):
            pytest.fail("the embedded engine took them")

    def test_a_pool_that_the_embedded_engine_has_open_is_busy(self, engine, table):
        with device_lock(table.metadata_device), pytest.raises(PoolBusy, match=str(os.getpid())):
            engine.activate_pool(POOL, table)
        dm.await_no_loops_on(table.metadata_device, table.data_device)

    def test_a_device_on_top_of_the_pool_itself_is_busy(self, engine, pool):
        linear = Target(Sectors(0), Sectors(2048), "linear", f"/dev/mapper/{POOL} 0")
        devices.create("on-top", linear, THIN_FLAGS)
        try:
            dm.settle()
            assert pool.devices() == []
            with pytest.raises(ThinBusy, match="on-top"):
                engine.deactivate_pool(POOL)
        finally:
            devices.remove("on-top")


class TestGrowth:
    def test_data_and_metadata_grow_together_in_use(self, pool, table, tmp_path):
        pool.create_thin(ONE)
        device = pool.activate("one", ONE, SIZE)
        make_file_system("ext4", device)
        with mounted(device, tmp_path / "mnt") as target:
            (target / "kept").write_bytes(b"kept" * 10_000)
            os.truncate(table.data_device, 2 * table.data_size)
            os.truncate(table.metadata_device, 3 * dm.METADATA_SIZE)
            pool.resize(table._replace(data_size=Bytes(2 * table.data_size)))
            status = pool.status()
            assert status.total_data_blocks == 2 * table.data_size // table.block_size
            assert status.total_metadata_blocks == 3 * dm.METADATA_SIZE // 4096
            assert (target / "kept").read_bytes() == b"kept" * 10_000
        assert not _suspended(POOL)

    def test_a_table_that_the_devices_are_too_small_for_changes_nothing(self, pool, table):
        before = pool.table()
        with pytest.raises(OSError, match="Invalid argument"):
            pool.resize(table._replace(data_size=Bytes(2 * table.data_size)))
        assert pool.table() == before
        state = devices.find_state(POOL)
        assert state is not None
        assert not state.suspended
        pool.create_thin(ONE)

    def test_other_tables_are_refused(self, pool, table):
        for field, value in (
            ("block_size", Bytes(2 * table.block_size)),
            ("data_size", Bytes(table.data_size // 2)),
            ("data_device", table.metadata_device),
        ):
            with pytest.raises((PoolMismatch, UsageError)):
                pool.resize(table._replace(**{field: value}))
        assert not _suspended(POOL)


class TestExport:
    def test_under_load_it_is_sound_each_time(self, pool, tmp_path):
        for thin_id in range(1, 6):
            pool.create_thin(ThinId(thin_id))
        device = pool.activate("one", ONE, SIZE)
        with _writing(device):
            for number in range(6):
                pool.create_snap(ThinId(100 + number), ThinId(2))
                _check_export(pool, tmp_path / "copy")

    def test_while_somebody_else_has_the_metadata_snap(self, pool, tmp_path):
        pool.create_thin(ONE)
        write(pool.activate("one", ONE, SIZE), 0, b"x" * 5 * dm.BLOCK)
        devices.message(POOL, "reserve_metadata_snap")
        pool.create_thin(TWO)
        _check_export(pool, tmp_path / "copy")
        assert 'dev_id="2"' in thin_tools.thin_dump(tmp_path / "copy")
        assert pool.status().held_metadata_root is not None
        devices.message(POOL, "release_metadata_snap")

    def test_the_pools_own_files_are_no_target(self, pool, table):
        for path in (table.metadata_device, table.data_device, *_devices(pool)):
            with pytest.raises(UsageError):
                pool.export_metadata(path)


class TestMetadataSnap:
    def test_one_that_a_killed_process_left_is_released(self, pool, runtime_base):
        pool.create_thin(ONE)
        devices.message(POOL, "reserve_metadata_snap")
        root = pool.status().held_metadata_root
        (runtime_base / POOL).mkdir(mode=0o700)
        (runtime_base / POOL / "metadata-snap").write_text(str(root))
        pool.create_thin(TWO)
        assert pool.thin_ids() == [ONE, TWO]
        assert pool.status().held_metadata_root is None
        assert not (runtime_base / POOL / "metadata-snap").exists()

    @pytest.mark.parametrize("left", ["", "12345", None])
    def test_one_of_somebody_else_stays(self, pool, runtime_base, left):
        pool.create_thin(ONE)
        devices.message(POOL, "reserve_metadata_snap")
        root = pool.status().held_metadata_root
        assert root is not None
        if left is not None:
            (runtime_base / POOL).mkdir(mode=0o700)
            (runtime_base / POOL / "metadata-snap").write_text(left)
        pool.create_thin(TWO)
        assert pool.thin_ids() == [ONE, TWO]
        assert pool.thin_status(TWO).mapped_blocks == 0
        assert pool.status().held_metadata_root == root
        devices.message(POOL, "release_metadata_snap")

    def test_one_that_a_crash_of_the_machine_left_goes_at_activation(self, engine, table):
        pool = engine.activate_pool(POOL, table)
        devices.message(POOL, "reserve_metadata_snap")
        engine.deactivate_pool(POOL)
        pool = engine.activate_pool(POOL, table)
        assert pool.status().held_metadata_root is None
        engine.deactivate_pool(POOL)
        check(table)

    def test_threads_take_turns(self, pool):
        pool.create_thin(ONE)
        found: list[list[ThinId]] = []
        threads = [threading.Thread(target=lambda: found.append(pool.thin_ids())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [[ONE]] * 6

    def test_thousands_of_thin_ids(self, engine, tmp_path):
        table = dm.make_table(tmp_path, metadata_size=Bytes(32 * MIB))
        pool = engine.activate_pool(POOL, table)
        for thin_id in range(2000):
            pool.create_thin(ThinId(thin_id))
        assert pool.thin_ids() == list(range(2000))
        engine.deactivate_pool(POOL)
        check(table)


class TestNodes:
    def test_the_node_of_a_device_that_left_goes(self, engine, table):
        pool = engine.activate_pool(POOL, table)
        for thin_id, name in ((ONE, "one"), (TWO, "two")):
            pool.create_thin(thin_id)
            with blockdev.opened(pool.activate(name, thin_id, SIZE), os.O_RDONLY):
                dm.settle()
                pool.deactivate(name, deferred=True)
                info = pool.info(name)
                assert info is not None
                assert info.state is Activation.LEAVING
                assert blockdev.is_block_device(info.path)
        wait_for(lambda: pool.devices() == [])
        pool.deactivate("one")
        dm.settle()
        assert not os.path.lexists("/dev/mapper/one")
        engine.deactivate_pool(POOL)
        dm.settle()
        assert not os.path.lexists("/dev/mapper/two")

    def test_a_stale_node_is_replaced(self, pool):
        pool.create_thin(ONE)
        stale = dmnode.path_of("one")
        os.mknod(stale, 0o60600, os.makedev(7, 200))
        path = pool.activate("one", ONE, SIZE)
        state = devices.find_state("one")
        assert state is not None
        assert blockdev.device_number(path) == state.number


class TestFeatures:
    def test_versions_are_asked_of_library_and_kernel(self, engine):
        features = engine.features()
        assert features.library_version == libdm.library_version()
        assert features.library_version.startswith("1.02.")
        assert features.driver_version.startswith("4.")
        assert features.udev_sync_needed
        assert features.deferred_removal


def _suspended(name: str) -> bool:
    state = devices.find_state(name)
    assert state is not None
    return state.suspended


def _devices(pool: KernelPool) -> tuple[Path, Path]:
    table = pool.table()
    return table.metadata_device, table.data_device


def _check_export(pool: KernelPool, copy: Path) -> None:
    pool.export_metadata(copy)
    if capabilities.tools():
        return
    with loop.attached(copy, direct_io=False, read_only=True) as node:
        checked = thin_tools.thin_check(node)
    assert checked, checked.output


@contextmanager
def _writing(device: Path) -> Iterator[None]:
    """Somebody writes to a device and flushes, again and again."""
    stop = threading.Event()
    rounds = itertools.count()

    def run() -> None:
        while not stop.is_set():
            write(device, next(rounds) * 7 % (SIZE // dm.BLOCK) * dm.BLOCK, b"load")

    writer = threading.Thread(target=run)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join(60)
    assert next(rounds) > 6
