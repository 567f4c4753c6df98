"""Where a pool stands and how large it is: loop files, devices of the user's own, their growth."""

import os
from pathlib import Path

import pytest

from devmapper.deviceset.deviceset import DeviceSet
from devmapper.engine.port import PoolMode
from devmapper.errors import (
    DevmapperError,
    EnvironmentLacking,
    IntegrityError,
    PoolFull,
    PoolMismatch,
    PoolUnusable,
    UsageError,
)
from devmapper.units import GIB, MIB
from tests.support.graphs import SMALL, check_consistent, open_small
from tests.support.local_engine import LocalEngine


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def engine():
    engine = LocalEngine()
    yield engine
    engine.crash()


@pytest.fixture
def devices(tmp_path: Path) -> tuple[Path, Path]:
    """Two files that stand for the user's data device and metadata device."""
    folder = tmp_path / "devices"
    folder.mkdir()
    data, metadata = folder / "data", folder / "metadata"
    for path in (data, metadata):
        path.touch()
        os.truncate(path, 4 * MIB)
    return data, metadata


def options_of(devices: tuple[Path, Path]) -> tuple[str, str]:
    data, metadata = devices
    return f"dm.datadev={data}", f"dm.metadatadev={metadata}"


def sizes(home: Path) -> tuple[int, int]:
    folder = home / "devicemapper"
    return (folder / "data").stat().st_size, (folder / "metadata").stat().st_size


def pool_sizes(graph: DeviceSet) -> tuple[int, int]:
    status = graph.pool.status()
    return status.total_data_blocks * status.block_size, status.total_metadata_blocks * 4096


class TestLoopFiles:
    def test_a_larger_option_enlarges_them_at_the_next_start(self, home, engine):
        open_small(home, engine).shutdown()
        with open_small(home, engine, "dm.loopdatasize=8M", "dm.loopmetadatasize=6M") as graph:
            assert sizes(home) == pool_sizes(graph) == (8 * MIB, 6 * MIB)
            check_consistent(home, graph)

    def test_the_same_while_the_pool_is_active(self, home, engine):
        with open_small(home, engine) as first:
            first.add_device("one", "")
            with open_small(home, engine, "dm.loopdatasize=8M", "dm.loopmetadatasize=6M") as graph:
                assert sizes(home) == pool_sizes(graph) == pool_sizes(first) == (8 * MIB, 6 * MIB)
                check_consistent(home, graph)

    def test_a_smaller_option_changes_nothing(self, home, engine, caplog):
        caplog.set_level("INFO")
        open_small(home, engine).shutdown()
        with open_small(home, engine, "dm.loopdatasize=2M", "dm.loopmetadatasize=1M") as graph:
            assert sizes(home) == pool_sizes(graph) == (4 * MIB, 4 * MIB)
        assert "cannot shrink" in caplog.text

    def test_the_default_of_an_option_does_not_enlarge(self, home, engine):
        open_small(home, engine).shutdown()
        with DeviceSet(home, engine=engine) as graph:
            assert sizes(home) == pool_sizes(graph) == (4 * MIB, 4 * MIB)

    def test_opening_without_initialising_does_not_enlarge(self, home, engine):
        open_small(home, engine).shutdown()
        options = (*SMALL, "dm.loopdatasize=8M")
        with DeviceSet(home, options, engine=engine, do_init=False) as graph:
            assert sizes(home) == pool_sizes(graph) == (4 * MIB, 4 * MIB)

    @pytest.mark.parametrize("half", ["data", "metadata"])
    def test_a_file_that_was_cut_off_is_not_made_whole_by_a_hole(self, home, engine, half):
        open_small(home, engine).shutdown()
        os.truncate(home / "devicemapper" / half, 2 * MIB)
        before = sizes(home)
        with pytest.raises(DevmapperError):
            open_small(home, engine, "dm.loopdatasize=8M", "dm.loopmetadatasize=8M")
        assert sizes(home) == before

    def test_a_damaged_superblock_is_left_as_it_is(self, home, engine):
        open_small(home, engine).shutdown()
        file = home / "devicemapper" / "metadata"
        with file.open("r+b") as metadata:
            metadata.seek(100)
            metadata.write(b"damage")
        before = file.read_bytes()
        with pytest.raises(IntegrityError):
            open_small(home, engine, "dm.loopdatasize=8M", "dm.loopmetadatasize=8M")
        assert file.read_bytes() == before

    def test_data_that_need_more_metadata_than_there_are_wait_for_them(self, home, engine, caplog):
        """Growing all the same would turn a kernel's pool read-only."""
        open_small(home, engine).shutdown()
        with open_small(home, engine, "dm.loopdatasize=1T") as graph:
            assert pool_sizes(graph) == (4 * MIB, 4 * MIB)
            assert "does not take its larger data file" in caplog.text
            graph.resize_pool(metadata_size=16 * MIB)
            assert pool_sizes(graph) == (1024 * GIB, 16 * MIB)
            check_consistent(home, graph)

    def test_metadata_too_small_for_the_pool_are_refused_before_files_are_made(self, home, engine):
        with pytest.raises(PoolMismatch, match="needs"):
            open_small(home, engine, "dm.loopdatasize=1T")
        assert not (home / "devicemapper").exists()


class TestGrowth:
    def test_metadata_alone(self, home, engine):
        with open_small(home, engine) as graph:
            graph.resize_pool(metadata_size=70 * MIB)  # a second bitmap
            assert sizes(home) == pool_sizes(graph) == (4 * MIB, 70 * MIB)
            check_consistent(home, graph)
            graph.add_device("one", "")
            check_consistent(home, graph)

    def test_both_at_once_where_data_need_the_new_metadata(self, home, engine):
        with open_small(home, engine) as graph:
            with pytest.raises(PoolFull):
                graph.resize_pool(1024 * GIB)
            assert sizes(home) == (4 * MIB, 4 * MIB)
            graph.resize_pool(1024 * GIB, metadata_size=32 * MIB)
            assert sizes(home) == pool_sizes(graph) == (1024 * GIB, 32 * MIB)
            check_consistent(home, graph)

    def test_never_smaller(self, home, engine):
        with open_small(home, engine) as graph:
            for arguments in ({"size": 2 * MIB}, {"metadata_size": 2 * MIB}):
                with pytest.raises(UsageError, match="cannot shrink"):
                    graph.resize_pool(**arguments)
            with pytest.raises(UsageError, match="16G"):
                graph.resize_pool(metadata_size=17 * GIB)
            assert sizes(home) == pool_sizes(graph) == (4 * MIB, 4 * MIB)

    def test_more_than_the_format_can_address_is_taken_and_stays_unused(self, home, engine):
        with open_small(home, engine) as graph:
            graph.resize_pool(metadata_size=16 * GIB)
            assert pool_sizes(graph)[1] == 255 * 16320 * 4096
            check_consistent(home, graph)
        with open_small(home, engine) as graph:  # nothing is left to complete
            check_consistent(home, graph)

    @pytest.mark.parametrize(
        "change", [{"needs_check": True}, {"mode": PoolMode.READ_ONLY}, {"mode": PoolMode.FAIL}]
    )
    def test_a_pool_that_takes_no_writes_is_refused_before_a_file_grows(
        self, home, engine, change, monkeypatch
    ):
        with open_small(home, engine) as graph:
            status = graph.pool.status()._replace(**change)
            monkeypatch.setattr(graph.pool, "status", lambda: status)
            with pytest.raises(PoolUnusable):
                graph.resize_pool(8 * MIB)
            assert sizes(home) == (4 * MIB, 4 * MIB)

    def test_devices_are_taken_as_large_as_they_are(self, home, engine, devices):
        data, metadata = devices
        with open_small(home, engine, *options_of(devices)) as graph:
            os.truncate(data, 9 * MIB + 5)
            os.truncate(metadata, 6 * MIB + 5)
            with pytest.raises(UsageError, match="were asked for"):
                graph.resize_pool(20 * MIB)
            graph.resize_pool()
            assert pool_sizes(graph) == (9 * MIB, 6 * MIB)
            graph.resize_pool(9 * MIB + 5)


class TestNamedDevices:
    def refuse(
        self, home: Path, engine: LocalEngine, options: tuple[str, ...], error: type[DevmapperError]
    ) -> str:
        """The start fails with *error*; nothing was made, changed or left active."""
        paths = [Path(option.partition("=")[2]) for option in options]
        before = [path.read_bytes() if path.is_file() else b"" for path in paths]
        with pytest.raises(error) as caught:
            open_small(home, engine, *options)
        assert [path.read_bytes() if path.is_file() else b"" for path in paths] == before
        assert engine.pools == {}
        assert not (home / "devicemapper").exists()
        return str(caught.value)

    def test_they_hold_the_pool(self, home, engine, devices):
        options = options_of(devices)
        with open_small(home, engine, *options) as graph:
            graph.add_device("one", "")
            status = graph.status()
            assert (status.data_file, status.metadata_file) == tuple(map(str, devices))
            assert status.data_loopback == status.metadata_loopback == ""
            graph.shutdown()
        with open_small(home, engine, *options) as graph:
            assert graph.list() == ["", "one"]

    def test_one_of_them_and_a_loop_file(self, home, engine, devices):
        with open_small(home, engine, f"dm.datadev={devices[0]}") as graph:
            status = graph.status()
            assert status.data_loopback == ""
            assert status.metadata_loopback == str(home / "devicemapper" / "metadata")
            assert not (home / "devicemapper" / "data").exists()

    def test_the_same_one_twice(self, home, engine, devices, tmp_path):
        data, _ = devices
        link = tmp_path / "link"
        link.symlink_to(data)
        hard = tmp_path / "hard"
        hard.hardlink_to(data)
        for other in (data, link, hard):
            options = (f"dm.datadev={data}", f"dm.metadatadev={other}")
            assert "share" in self.refuse(home, engine, options, UsageError)

    def test_what_is_no_device(self, home, engine, devices, tmp_path):
        data, metadata = devices
        for wrong, error in (
            (tmp_path / "missing", EnvironmentLacking),
            (data / "below a file", EnvironmentLacking),
            (tmp_path, UsageError),
            (Path("/dev/null"), UsageError),
        ):
            for options in (
                (f"dm.datadev={wrong}", f"dm.metadatadev={metadata}"),
                (f"dm.datadev={data}", f"dm.metadatadev={wrong}"),
            ):
                assert str(wrong) in self.refuse(home, engine, options, error)

    def test_metadata_that_are_not_blank(self, home, engine, devices):
        devices[1].write_bytes(b"important" * 1000 + bytes(MIB))
        self.refuse(home, engine, options_of(devices), PoolMismatch)

    @pytest.mark.parametrize("half", [0, 1])
    def test_a_file_system_is_not_overwritten(self, home, engine, devices, half):
        """The beginning of a btrfs is blank, as that of metadata which were zeroed."""
        with devices[half].open("r+b") as file:
            file.seek(0x10040)
            file.write(b"_BHRfS_M")
        assert "btrfs" in self.refuse(home, engine, options_of(devices), PoolMismatch)

    def test_too_small(self, home, engine, devices):
        data, metadata = devices
        os.truncate(data, 60_000)
        assert "one data block" in self.refuse(home, engine, options_of(devices), PoolMismatch)
        os.truncate(data, 4 * MIB)
        os.truncate(metadata, 40_000)
        assert "at least" in self.refuse(home, engine, options_of(devices), PoolMismatch)

    def test_blank_metadata_for_a_graph_with_layers(self, home, engine, devices):
        options = options_of(devices)
        with open_small(home, engine, *options) as graph:
            graph.add_device("one", "")
            graph.shutdown()
        devices[1].write_bytes(bytes(4 * MIB))
        assert "blank" in self.refuse(home, engine, options, PoolMismatch)

    def test_a_pool_of_another_graph(self, home, engine, devices, tmp_path):
        options = options_of(devices)
        with open_small(tmp_path / "other", engine, *options) as graph:
            graph.add_device("one", "")
            graph.shutdown()
        assert "not empty" in self.refuse(home, engine, options, PoolMismatch)
        with open_small(tmp_path / "other", engine, *options) as graph:
            assert graph.list() == ["", "one"]

    def test_other_devices_than_those_of_the_active_pool(self, home, engine, devices, tmp_path):
        other = tmp_path / "other"
        other.write_bytes(bytes(4 * MIB))
        with open_small(home, engine, *options_of(devices)):
            with pytest.raises(PoolMismatch, match="active on"):
                open_small(home, engine, f"dm.datadev={other}", f"dm.metadatadev={devices[1]}")
            open_small(home, engine).close()  # without the options it is found all the same

    def test_the_block_size_is_chosen_once(self, home, engine, devices):
        options = options_of(devices)
        with open_small(home, engine, *options, "dm.blocksize=128K") as graph:
            assert graph.status().sector_size == 128 * 1024
            graph.shutdown()
        with pytest.raises(PoolMismatch, match=r"dm\.blocksize"):
            open_small(home, engine, *options, "dm.blocksize=64K")
        with open_small(home, engine, *options) as graph:
            assert graph.status().sector_size == 128 * 1024
