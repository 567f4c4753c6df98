"""A disk becomes a pool with LVM, in a real kernel: made, refused, undone, found again."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.cli import main
from devmapper.deviceset import direct_lvm, setup_config
from devmapper.deviceset.direct_lvm import PROFILE, PROFILE_DIRECTORY
from devmapper.deviceset.given_pool import find_given_pool
from devmapper.deviceset.options import parse_options
from devmapper.deviceset.records import RecordStore
from devmapper.errors import (
    DeviceBusy,
    DevmapperError,
    EnvironmentLacking,
    PoolMismatch,
    ToolError,
    UsageError,
)
from devmapper.linux import blockdev, disks, loop, lvm, mount, process
from devmapper.units import GIB, MIB
from tests.support.local_engine import LocalEngine

pytestmark = [pytest.mark.root, pytest.mark.kernel]

SIZE = 1 * GIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A blank disk; whatever LVM has put on it is gone afterwards."""
    file = tmp_path / "disk"
    file.touch()
    os.truncate(file, SIZE)
    with loop.attached(file) as device:
        yield device
        if lvm.find_volume_group("docker") is not None:
            lvm.run("vgremove", "-f", "-y", "docker")
            lvm.run("pvremove", "-f", "-y", str(device))
        (PROFILE_DIRECTORY / f"{PROFILE}.profile").unlink(missing_ok=True)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / "metadata").mkdir(parents=True)
    return home


def set_up(home: Path, disk: Path, *words: str) -> bool:
    options = parse_options([f"dm.directlvm_device={disk}", *words])
    return direct_lvm.set_up(home, options, has_layers=lambda: False)


def refuse(home: Path, disk: Path, error: type[DevmapperError], *words: str) -> str:
    """The disk is refused and nothing was written to it."""
    found = disks.signatures(disk)
    with pytest.raises(error) as caught:
        set_up(home, disk, *words)
    assert disks.signatures(disk) == found
    assert lvm.find_volume_group("docker") is None
    assert setup_config.load(home) is None
    return str(caught.value)


def table() -> str:
    return process.run(["dmsetup", "table", "docker-thinpool"]).stdout.decode()


def test_a_blank_disk_becomes_a_pool(home, disk):
    assert set_up(home, disk, "dm.thinp_autoextend_threshold=70")
    fields = table().split()
    assert fields[2] == "thin-pool"
    assert fields[5] == "1024"  # 512 KiB
    assert "skip_block_zeroing" in fields
    extents = SIZE // (4 * MIB) - 1
    assert int(fields[1]) * 512 == extents * 95 // 100 * 4 * MIB
    report = process.run(["dmsetup", "status", "docker-thinpool"]).stdout.split()
    assert report[3] == b"0"  # the transaction id, which is ours from now on
    assert lvm.transaction_id("docker", "thinpool") == 0
    profile = (PROFILE_DIRECTORY / f"{PROFILE}.profile").read_text()
    assert "thin_pool_autoextend_threshold=70" in profile
    assert "thin_pool_autoextend_percent=20" in profile
    row = lvm.run("lvs", "--noheadings", "-o", "lv_profile", "docker/thinpool")
    assert row.stdout.strip() == b"docker-thinpool"
    group = lvm.find_volume_group("docker")
    assert group is not None
    assert group.tags == frozenset()


def test_docker_reads_what_was_kept_and_a_later_start_has_to_agree(home, disk):
    percents = ("dm.thinp_percent=90", "dm.thinp_metapercent=2%")
    assert set_up(home, disk, *percents)
    assert json.loads((home / "setup-config.json").read_text()) == {
        "Device": str(disk),
        "ThinpPercent": 90,
        "ThinpMetaPercent": 2,
        "AutoExtendPercent": 0,
        "AutoExtendThreshold": 0,
    }
    before = table()
    assert not set_up(home, disk, *percents)
    assert not set_up(home, disk, *percents, "dm.thinp_autoextend_percent=20")
    with pytest.raises(PoolMismatch, match="ThinpPercent is 90, but 95"):
        set_up(home, disk)
    with pytest.raises(PoolMismatch, match="Device"):
        set_up(home, Path("/dev/null"), *percents)
    assert table() == before


def test_the_graph_uses_its_pool_without_further_options(home, disk):
    set_up(home, disk)
    assert setup_config.with_given_pool(home, parse_options([])).thin_pool_device == (
        "docker-thinpool"
    )
    other = parse_options(["dm.thinpooldev=mine"])
    assert setup_config.with_given_pool(home, other).thin_pool_device == "mine"


def test_the_command(home, disk, capsys):
    words = ["--root", str(home), "--json", "--engine", "kernel"]
    words += ["--storage-opt", "dm.override_udev_sync_check=true", "pool", "create"]
    assert main.run([*words, "--device", str(disk), "--autoextend-threshold", "70"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == {"name": "docker-thinpool", "device": str(disk), "made": True}
    assert "thin-pool" in table()
    assert main.run([*words, "--device", str(disk), "--autoextend-threshold", "70"]) == 0
    assert json.loads(capsys.readouterr().out)["made"] is False
    assert main.run([*words, "--device", str(disk)]) == PoolMismatch.exit_code
    assert main.run([*words[:-2], "engine", "stop"]) == 0  # the pool is LVM's and stays
    assert "thin-pool" in table()


def test_a_graph_with_layers_keeps_its_pool(home, disk):
    options = parse_options([f"dm.directlvm_device={disk}"])
    with pytest.raises(PoolMismatch, match="has layers"):
        direct_lvm.set_up(home, options, has_layers=lambda: True)
    assert disks.signatures(disk) == []


class TestWhatADiskMayHold:
    def test_a_file_system(self, home, disk):
        process.run(["mkfs.ext4", "-q", str(disk)])
        assert "ext4" in refuse(home, disk, PoolMismatch)
        assert set_up(home, disk, "dm.directlvm_device_force=true")

    def test_what_force_does_not_overwrite(self, home, disk):
        process.run(["mkswap", str(disk)])
        assert "swap" in refuse(home, disk, PoolMismatch, "dm.directlvm_device_force=true")

    def test_a_partition_table(self, home, disk):
        process.run(["sfdisk", "-q", str(disk)], input=b"label: gpt\n,100M\n", ok=(0, 1))
        words = ("dm.directlvm_device_force=true",)
        for more in ((), words):
            message = refuse(home, disk, PoolMismatch, *more)
            assert "gpt" in message or "partitions" in message

    def test_a_physical_volume(self, home, disk):
        lvm.run("pvcreate", str(disk))
        assert "LVM2_member" in refuse(home, disk, PoolMismatch, "dm.directlvm_device_force=true")

    def test_a_mounted_file_system(self, home, disk, tmp_path):
        process.run(["mkfs.ext4", "-q", str(disk)])
        point = tmp_path / "mnt"
        point.mkdir()
        mount.mount(disk, point, "ext4")
        try:
            message = refuse(home, disk, DeviceBusy, "dm.directlvm_device_force=true")
            assert str(point) in message
        finally:
            mount.unmount(point)

    def test_a_device_of_device_mapper(self, home, disk):
        sectors = blockdev.size(disk) // 512
        process.run(["dmsetup", "create", "psheld", "--table", f"0 {sectors} linear {disk} 0"])
        try:
            assert "dm-" in refuse(home, disk, DeviceBusy)
        finally:
            process.run(["dmsetup", "remove", "--retry", "psheld"])


class TestWhatIsNoDisk:
    def test_by_name(self, home, tmp_path):
        with pytest.raises(EnvironmentLacking, match="does not exist"):
            set_up(home, Path("/dev/none"))
        with pytest.raises(UsageError, match="not a block device"):
            set_up(home, tmp_path)

    def test_too_small(self, home, tmp_path):
        file = tmp_path / "small"
        file.touch()
        os.truncate(file, 100 * MIB)
        with loop.attached(file) as device:
            assert "expected" in refuse(home, device, PoolMismatch)

    def test_read_only(self, home, tmp_path):
        file = tmp_path / "ro"
        file.touch()
        os.truncate(file, SIZE)
        with loop.attached(file, read_only=True) as device:
            assert "read-only" in refuse(home, device, EnvironmentLacking)


@pytest.mark.parametrize("program", ["vgcreate", "lvconvert", "lvchange"])
def test_a_step_that_fails_is_undone_with_all_before_it(home, disk, program, monkeypatch):
    run = lvm.run

    def failing(*argv: str) -> process.CompletedRun:
        if argv[0] == program:
            raise ToolError(argv, 5, "made to fail by the test")
        return run(*argv)

    monkeypatch.setattr(lvm, "run", failing)
    assert "made to fail" in refuse(home, disk, ToolError)
    monkeypatch.undo()
    assert not (PROFILE_DIRECTORY / f"{PROFILE}.profile").exists()
    assert set_up(home, disk)


def test_a_config_that_cannot_be_kept_undoes_the_pool(home, disk, monkeypatch):
    def failing(*_: object) -> None:
        raise OSError(28, "no space left on the test")

    monkeypatch.setattr(setup_config, "save", failing)
    with pytest.raises(OSError, match="no space left"):
        set_up(home, disk)
    assert disks.signatures(disk) == []
    assert lvm.find_volume_group("docker") is None


class Killed(BaseException):
    """SIGKILL amid a set-up: nothing is undone."""


@pytest.mark.parametrize("program", ["lvcreate", "lvchange"])
def test_a_set_up_that_was_killed_is_begun_anew(home, disk, program, monkeypatch):
    run = lvm.run

    def killed(*argv: str) -> process.CompletedRun:
        if argv[0] == program:
            raise Killed
        return run(*argv)

    monkeypatch.setattr(lvm, "run", killed)
    monkeypatch.setattr(direct_lvm, "_undone", lambda *_: None)
    with pytest.raises(Killed):
        set_up(home, disk)
    monkeypatch.undo()
    assert set_up(home, disk)
    assert "thin-pool" in table()


def test_somebody_elses_volume_group_stays(home, disk, tmp_path):
    file = tmp_path / "other"
    file.touch()
    os.truncate(file, SIZE)
    with loop.attached(file) as other:
        lvm.run("vgcreate", "docker", str(other))
        try:
            with pytest.raises(PoolMismatch, match="volume group 'docker'"):
                set_up(home, disk)
            assert disks.signatures(disk) == []
        finally:
            lvm.run("vgremove", "-f", "-y", "docker")
            lvm.run("pvremove", "-f", "-y", str(other))


def test_a_pool_that_has_held_thin_volumes_of_lvm_is_refused(home, disk):
    """Also under the name of the hidden device, and after the last volume is gone."""
    set_up(home, disk)
    store = RecordStore(home / "metadata")
    lvm.run("lvcreate", "-y", "-V", "64M", "--thinpool", "docker/thinpool", "-n", "theirs")
    for name in ("docker-thinpool", "docker-thinpool-tpool"):
        with pytest.raises(PoolMismatch, match="held thin volumes of LVM"):
            find_given_pool(LocalEngine(), name, store)
    lvm.run("lvremove", "-f", "-y", "docker/theirs")
    with pytest.raises(PoolMismatch, match="held thin volumes of LVM"):
        find_given_pool(LocalEngine(), "docker-thinpool", store)
