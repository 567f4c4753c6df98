"""Pools of a graph on the kernel's device mapper: found, taken over, refused, found again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import devmapper
from devmapper.deviceset import direct_lvm
from devmapper.deviceset.names import GraphNames
from devmapper.deviceset.steps import Step
from devmapper.driver import Driver
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.port import Engine, PoolTable
from devmapper.engine.select import choose_engine
from devmapper.errors import (
    DevmapperError,
    PoolBusy,
    PoolMismatch,
    PoolNotFound,
    UsageError,
)
from devmapper.linux import blockdev, disks, loop, lvm, process
from devmapper.units import GIB, MIB, Bytes
from tests.support.local_engine import LocalEngine
from tests.support.thin_tools import thin_check

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.tools]

GRAPH = (
    "dm.loopdatasize=64M",
    "dm.loopmetadatasize=4M",
    "dm.basesize=16M",
    "dm.mkfsarg=-q",
    "dm.override_udev_sync_check=true",
)
GIVEN = "pstest-given"  # a pool that the administrator made


KILLED_WHILE_IT_GROWS = """
import os
from devmapper.deviceset.deviceset import DeviceSet
from devmapper.engine.select import choose_engine

def checkpoint(step):
    if step == {step!r}:
        os.kill(os.getpid(), 9)

engine = choose_engine("kernel")
graph = DeviceSet({home!r}, {options!r}, engine=engine, checkpoint=checkpoint)
graph.resize_pool(128 << 20, metadata_size=80 << 20)
"""


@pytest.fixture
def engine() -> Engine:
    return choose_engine("kernel")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "graph"


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    """Nothing of device mapper and no loop device is left that was not there before."""
    before = active(), loop.attached_devices()
    yield
    assert (active(), loop.attached_devices()) == before


def dmsetup(*argv: str) -> str:
    return process.run(["dmsetup", *argv]).stdout.decode()


def active() -> list[str]:
    names = dmsetup("info", "-c", "--noheadings", "-o", "name").split("\n")
    return sorted(name for name in names if name and "No devices" not in name)


@contextmanager
def disk(folder: Path, name: str, size: int) -> Iterator[Path]:
    file = folder / name
    file.touch()
    os.truncate(file, size)
    with loop.attached(file) as node:
        yield node


@contextmanager
def mapped(name: str, *lines: str) -> Iterator[Path]:
    """A device-mapper device with this table."""
    process.run(["dmsetup", "create", name], input="\n".join(lines).encode())
    try:
        yield Path("/dev/mapper") / name
    finally:
        process.run(["dmsetup", "remove", "--retry", name])


@contextmanager
def devices(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Two blank disks: data and metadata."""
    with disk(folder, "data", 64 * MIB) as data, disk(folder, "metadata", 4 * MIB) as metadata:
        yield data, metadata


@contextmanager
def given_pool(folder: Path, *, sectors: int = 128) -> Iterator[str]:
    with devices(folder) as (data, metadata):
        size = blockdev.size(data) // 512
        line = f"0 {size} thin-pool {metadata} {data} {sectors} 0 1 skip_block_zeroing"
        with mapped(GIVEN, line):
            yield GIVEN


def open_graph(home: Path, engine: Engine, *options: str) -> Driver:
    return devmapper.init(home, (*GRAPH, *options), engine=engine)


def named(data: Path, metadata: Path) -> tuple[str, str]:
    return f"dm.datadev={data}", f"dm.metadatadev={metadata}"


def use(driver: Driver, layer: str, parent: str = "") -> None:
    driver.create(layer, parent)
    (Path(driver.get(layer)) / layer).write_text(layer)
    driver.put(layer)


def read(driver: Driver, layer: str, name: str) -> str:
    try:
        return (Path(driver.get(layer)) / name).read_text()
    finally:
        driver.put(layer)


def refuse(
    home: Path, engine: Engine, error: type[DevmapperError], *options: str
) -> DevmapperError:
    """The start fails with *error* and leaves nothing active, suspended or made."""
    before = active(), loop.attached_devices()
    with pytest.raises(error) as caught:
        open_graph(home, engine, *options)
    assert (active(), loop.attached_devices()) == before
    assert not (home / "devicemapper").exists()
    return caught.value


class TestLoopFiles:
    def test_found_in_a_pool_that_another_process_made_with_gaps_between_loops(
        self, home, engine, tmp_path
    ):
        """moby scans /dev/loop0, 1, 2 … until one is missing, and shows nothing for such a pool."""
        with disk(tmp_path, "first", MIB), ExitStack() as gap:
            gap.enter_context(disk(tmp_path, "gap", MIB))
            open_graph(home, engine).close()
            gap.close()
            with open_graph(home, engine) as driver:
                status = driver.devices.status()
                folder = home / "devicemapper"
                assert status.data_loopback == str(folder / "data")
                assert status.metadata_loopback == str(folder / "metadata")
                assert status.data_file.startswith("/dev/loop")
                assert "Data loop file" in dict(driver.status())
                driver.cleanup()

    def test_growth_online_and_at_a_start(self, home, engine):
        with open_graph(home, engine) as driver:
            use(driver, "one")
            root = Path(driver.get("one"))
            driver.devices.resize_pool(128 * MIB, metadata_size=80 * MIB)
            status = driver.devices.status()
            assert (status.data.total, status.metadata.total) == (128 * MIB, 80 * MIB)
            (root / "more").write_bytes(b"more" * 100_000)
            driver.put("one")
        with open_graph(home, engine, "dm.loopdatasize=160M", "dm.loopmetadatasize=90M") as driver:
            status = driver.devices.status()
            assert (status.data.total, status.metadata.total) == (160 * MIB, 90 * MIB)
            driver.cleanup()
        with open_graph(home, engine, "dm.loopdatasize=200M") as driver:
            assert driver.devices.status().data.total == 200 * MIB
            assert read(driver, "one", "more") == "more" * 100_000
            driver.cleanup()
        assert thin_check(home / "devicemapper" / "metadata")

    def test_a_file_that_grew_while_the_pool_did_not_is_taken_at_the_next_start(self, home, engine):
        with open_graph(home, engine) as driver:
            use(driver, "one")
        os.truncate(home / "devicemapper" / "data", 96 * MIB)
        os.truncate(home / "devicemapper" / "metadata", 8 * MIB)
        with open_graph(home, engine) as driver:
            status = driver.devices.status()
            assert (status.data.total, status.metadata.total) == (96 * MIB, 8 * MIB)
            driver.cleanup()

    @pytest.mark.parametrize(
        "step",
        [Step.METADATA_FILE_GROWN, Step.METADATA_GROWN, Step.DATA_FILE_GROWN, Step.DATA_GROWN],
    )
    def test_killed_while_it_grows(self, home, engine, step):
        with open_graph(home, engine) as driver:
            use(driver, "one")
        script = KILLED_WHILE_IT_GROWS.format(home=str(home), options=GRAPH, step=str(step))
        environment = {**os.environ, "PYTHONPATH": str(Path(devmapper.__file__).parents[1])}
        words = [sys.executable, "-c", script]
        done = subprocess.run(words, check=False, timeout=60, env=environment)
        assert done.returncode == -signal.SIGKILL
        with open_graph(home, engine) as driver:
            assert all("SUSPENDED" not in dmsetup("info", name) for name in active())
            status = driver.devices.status()
            sizes = [(home / "devicemapper" / half).stat().st_size for half in ("data", "metadata")]
            assert [status.data.total, status.metadata.total] == sizes
            assert sizes[1] == 80 * MIB
            driver.devices.resize_pool(128 * MIB, metadata_size=80 * MIB)
            assert driver.devices.status().data.total == 128 * MIB
            assert read(driver, "one", "one") == "one"
            driver.cleanup()
        assert thin_check(home / "devicemapper" / "metadata")

    def test_data_beyond_what_metadata_have_room_for_are_refused_and_the_pool_stays_writable(
        self, home, engine
    ):
        with open_graph(home, engine) as driver:
            with pytest.raises(DevmapperError):
                driver.devices.resize_pool(4096 * GIB)
            assert driver.devices.status().mode == "rw"
            assert driver.devices.status().data.total == 64 * MIB
            use(driver, "one")
            driver.cleanup()

    def test_one_engine_at_a_time(self, home, engine):
        """Docker's pool may be active while our embedded engine is asked, and the reverse."""
        with open_graph(home, engine) as driver:
            use(driver, "one")
            files = {name: home / "devicemapper" / name for name in ("data", "metadata")}
            with pytest.raises(PoolBusy, match="dm-"):
                devmapper.init(home, GRAPH, engine=LocalEngine())
            driver.cleanup()
        table = PoolTable(files["metadata"], files["data"], Bytes(64 * MIB), Bytes(64 * 1024))
        with EmbeddedPool.open(table), pytest.raises(PoolBusy):
            open_graph(home, engine)
        with open_graph(home, engine) as driver:
            assert read(driver, "one", "one") == "one"
            driver.cleanup()


class TestNamedDevices:
    def test_found_again_after_a_reboot_and_grown(self, home, engine, tmp_path):
        with (
            devices(tmp_path) as (data, metadata),
            open_graph(home, engine, *named(data, metadata)) as driver,
        ):
            use(driver, "one")
            status = driver.devices.status()
            assert status.data_loopback == status.metadata_loopback == ""
            assert not driver.devices.options.discard_on_delete
            driver.cleanup()
        # As after a reboot: other nodes, the same disks
        for size in (96 * MIB, 128 * MIB):
            os.truncate(tmp_path / "data", size)
            with (
                loop.attached(tmp_path / "metadata") as metadata,
                loop.attached(tmp_path / "data") as data,
                open_graph(home, engine, *named(data, metadata)) as driver,
            ):
                assert read(driver, "one", "one") == "one"
                driver.devices.resize_pool()
                assert driver.devices.status().data.total == size
                driver.cleanup()

    def test_what_is_in_use(self, home, engine, tmp_path):
        with devices(tmp_path) as (data, metadata):
            size = blockdev.size(data) // 512
            with mapped("pstest-held", f"0 {size} linear {data} 0"):
                error = refuse(home, engine, DevmapperError, *named(data, metadata))
                assert "in use" in str(error)
                assert "dm-" in str(error)

    def test_a_device_that_fails(self, home, engine, tmp_path):
        with devices(tmp_path) as (data, metadata):
            size = blockdev.size(data) // 512
            with mapped("pstest-dead", f"0 {size} error") as dead:
                for wrong in (named(dead, metadata), named(data, dead)):
                    assert "pstest-dead" in str(refuse(home, engine, DevmapperError, *wrong))

    def test_a_read_only_device(self, home, engine, tmp_path):
        with devices(tmp_path) as (data, metadata):
            for device in (data, metadata):
                process.run(["blockdev", "--setro", str(device)])
                error = refuse(home, engine, DevmapperError, *named(data, metadata))
                assert str(device) in str(error)
                process.run(["blockdev", "--setrw", str(device)])

    def test_metadata_that_are_no_pool(self, home, engine, tmp_path):
        with devices(tmp_path) as (data, metadata):
            metadata.write_bytes(b"important")
            error = refuse(home, engine, PoolMismatch, *named(data, metadata))
            assert "dd if=/dev/zero" in error.hint
            assert metadata.read_bytes().startswith(b"important")

    def test_the_pool_of_another_graph(self, home, engine, tmp_path):
        with devices(tmp_path) as (data, metadata):
            with open_graph(tmp_path / "other", engine, *named(data, metadata)) as driver:
                use(driver, "one")
                driver.cleanup()
            refuse(home, engine, PoolMismatch, *named(data, metadata))
            with open_graph(tmp_path / "other", engine, *named(data, metadata)) as driver:
                assert read(driver, "one", "one") == "one"
                driver.cleanup()

    def test_a_disk_that_takes_no_writes_at_the_first_start(self, home, engine, tmp_path):
        """The kernel turns the pool read-only; once the disk is well and was checked, all is."""
        with devices(tmp_path) as (data, metadata):
            size = blockdev.size(data) // 512
            bad = f"0 {size} flakey {data} 0 0 3600 1 error_writes"
            with mapped("pstest-flakey", bad) as node:
                options = named(node, metadata)
                before = active(), loop.attached_devices()
                with pytest.raises((DevmapperError, OSError)):
                    open_graph(home, engine, *options)
                assert (active(), loop.attached_devices()) == before
                dmsetup("suspend", "pstest-flakey")
                dmsetup("load", "pstest-flakey", "--table", f"0 {size} linear {data} 0")
                dmsetup("resume", "pstest-flakey")
                process.run(["thin_check", "--clear-needs-check-flag", str(metadata)])
                with open_graph(home, engine, *options) as driver:
                    use(driver, "one")
                    assert read(driver, "one", "one") == "one"
                    assert list(driver.devices.inconsistencies()) == []
                    driver.cleanup()

    def test_a_disk_that_dies_while_it_is_used(self, home, engine, tmp_path):
        """Writes fail with an error; the pool can be let go of, and comes back with the disk."""
        with devices(tmp_path) as (data, metadata), ExitStack() as undo:
            size = blockdev.size(metadata) // 512
            good = f"0 {size} linear {metadata} 0"
            node = undo.enter_context(mapped("pstest-meta", good))
            options = named(data, node)
            with open_graph(home, engine, *options) as driver:
                use(driver, "one")
                dmsetup("suspend", "--nolockfs", "--noflush", "pstest-meta")
                dmsetup("load", "pstest-meta", "--table", f"0 {size} error")
                dmsetup("resume", "pstest-meta")
                with pytest.raises((DevmapperError, OSError)):
                    driver.create("two", "one")
                assert all("SUSPENDED" not in dmsetup("info", name) for name in active())
            engine.deactivate_pool(GraphNames.of(home).pool)
            dmsetup("load", "pstest-meta", "--table", good)
            dmsetup("resume", "pstest-meta")
            process.run(["thin_check", "--clear-needs-check-flag", str(node)])
            with open_graph(home, engine, *options) as driver:
                assert read(driver, "one", "one") == "one"
                assert list(driver.devices.inconsistencies()) == []
                driver.cleanup()


class TestGivenPool:
    def test_an_empty_one_is_taken_over_and_stays_active(self, home, engine, tmp_path):
        with given_pool(tmp_path) as name:
            for spelled in (name, f"/dev/mapper/{name}"):
                with open_graph(home, engine, f"dm.thinpooldev={spelled}") as driver:
                    if not driver.exists("one"):
                        use(driver, "one")
                    assert read(driver, "one", "one") == "one"
                    status = driver.devices.status()
                    assert status.pool_name == name
                    assert status.data_loopback == ""
                    assert not driver.devices.options.discard_on_delete
                    with pytest.raises(UsageError, match="not made of"):
                        driver.devices.resize_pool(128 * MIB)
                    driver.cleanup()
                assert active() == [name]
            assert not (home / "devicemapper").exists()

    def test_its_own_block_size_holds(self, home, engine, tmp_path):
        with given_pool(tmp_path, sectors=1024) as name:
            option = f"dm.thinpooldev={name}"
            refuse(home, engine, PoolMismatch, option, "dm.blocksize=64K")
            with open_graph(home, engine, option) as driver:
                assert driver.devices.status().sector_size == 512 * 1024
                driver.cleanup()

    def test_not_active(self, home, engine, tmp_path):
        option = f"dm.thinpooldev={GIVEN}"
        assert "activate it first" in refuse(home, engine, PoolNotFound, option).hint
        with given_pool(tmp_path), open_graph(home, engine, option) as driver:
            use(driver, "one")
            driver.cleanup()
        refuse(home, engine, PoolNotFound, option)  # as after a reboot
        assert (home / "metadata" / "one").exists()

    def test_no_thin_pool(self, home, engine, tmp_path):
        with disk(tmp_path, "data", 8 * MIB) as data:
            size = blockdev.size(data) // 512
            with mapped("pstest-linear", f"0 {size} linear {data} 0"):
                error = refuse(home, engine, PoolMismatch, "dm.thinpooldev=pstest-linear")
                assert "linear" in str(error)

    @pytest.mark.parametrize("message", ["create_thin 7", "set_transaction_id 0 5"])
    def test_one_that_somebody_has_used(self, home, engine, tmp_path, message):
        with given_pool(tmp_path) as name:
            dmsetup("message", name, "0", message)
            error = refuse(home, engine, PoolMismatch, f"dm.thinpooldev={name}")
            assert "not empty" in str(error)

    def test_the_one_of_another_graph(self, home, engine, tmp_path):
        with given_pool(tmp_path) as name:
            option = f"dm.thinpooldev={name}"
            with open_graph(tmp_path / "other", engine, option) as driver:
                use(driver, "one")
                driver.cleanup()
            refuse(home, engine, PoolMismatch, option)

    def test_a_graph_does_not_take_a_pool_with_another_base(self, home, engine, tmp_path):
        """Same thin id, same transaction id: only the base's UUID tells."""
        one, two = tmp_path / "one", tmp_path / "two"
        one.mkdir()
        two.mkdir()
        with given_pool(one) as name:
            option = f"dm.thinpooldev={name}"
            open_graph(home, engine, option).cleanup()
        with given_pool(two) as name:
            open_graph(tmp_path / "other", engine, option).cleanup()
            with pytest.raises(PoolMismatch, match="UUID"):
                open_graph(home, engine, option)
            assert active() == [name]


class TestDirectLvm:
    def test_a_graph_on_a_whole_disk_found_again_after_a_reboot(self, home, engine, tmp_path):
        with disk(tmp_path, "disk", 1 * GIB) as node, ExitStack() as undo:
            undo.callback(lvm.run, "pvremove", "-f", "-y", str(node))
            undo.callback(lvm.run, "vgremove", "-f", "-y", "docker")
            with open_graph(home, engine, f"dm.directlvm_device={node}") as driver:
                use(driver, "one")
                assert driver.devices.status().pool_name == "docker-thinpool"
                assert driver.devices.status().sector_size == 512 * 1024
                driver.cleanup()
            lvm.run("vgchange", "-an", "docker")
            error = refuse(home, engine, PoolNotFound)
            assert "lvchange -ay docker/thinpool" in error.hint
            lvm.run("vgchange", "-ay", "docker")  # LVM takes the pool with our transaction id
            with open_graph(home, engine) as driver:
                assert read(driver, "one", "one") == "one"
                driver.cleanup()
            with pytest.raises(PoolMismatch, match="other settings"):
                open_graph(
                    home,
                    engine,
                    f"dm.directlvm_device={node}",
                    "dm.thinp_percent=50",
                    "dm.thinp_metapercent=1",
                )
            profile = direct_lvm.PROFILE_DIRECTORY / f"{direct_lvm.PROFILE}.profile"
            undo.callback(profile.unlink)
        assert disks.dm_uuid("docker-thinpool") is None
