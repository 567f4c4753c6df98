"""Status rows, mount options, and what an engine must be able to do."""

from pathlib import Path

import pytest

from devmapper.deviceset.mounting import label_of
from devmapper.deviceset.mountopts import mount_options
from devmapper.deviceset.options import parse_options
from devmapper.deviceset.requirements import check_engine
from devmapper.deviceset.status import (
    BaseLayer,
    DevStatus,
    PoolPaths,
    dev_status,
    graph_status,
    rows,
)
from devmapper.engine.port import EngineFeatures, PoolMode, PoolStatus, ThinStatus
from devmapper.errors import EnvironmentLacking, UsageError
from devmapper.linux.mount import MountFlag
from devmapper.units import GIB, Bytes, ThinId, TransactionId
from tests.support.graphs import open_small
from tests.support.local_engine import LocalEngine

FEATURES = EngineFeatures(
    "kernel", "1.02.185 (2022-05-18)", "4.47.0", udev_sync=True, udev_sync_needed=True,
    deferred_removal=True,
)  # fmt: skip
POOL = PoolStatus(
    TransactionId(24), 878, 8192, 599, 32768, Bytes(65536), None, PoolMode.WRITE,
    needs_check=False, error_if_no_space=False, discard_passdown=True, low_water_reached=False,
)  # fmt: skip


BASE = BaseLayer(Bytes(10 * GIB), "xfs")


def status_of(pool: PoolStatus | None, paths: PoolPaths, home: Path) -> dict[str, str]:
    return dict(
        rows(graph_status(home, "p-pool", paths, pool, FEATURES, BASE, deferred_removal=False))
    )


def test_rows_have_dockers_numbers(tmp_path):
    """The numbers are those of a pool of dockerd 20.10 and what its `docker info` made of them."""
    found = status_of(POOL, PoolPaths("/dev/loop1", "", "/dev/loop2", ""), tmp_path)
    assert found["Pool Blocksize"] == "65.54 kB"
    assert found["Base Device Size"] == "10.74 GB"
    assert found["Base Filesystem"] == "xfs"
    assert found["Data Space Used"] == "39.26 MB"
    assert found["Data Space Total"] == "2.147 GB"
    assert found["Data Space Available"] == "2.108 GB"
    assert found["Metadata Space Used"] == "3.596 MB"
    assert found["Metadata Space Total"] == "33.55 MB"
    assert found["Metadata Space Available"] == "29.96 MB"
    assert found["Udev Sync Supported"] == "true"
    assert found["Deferred Removal Enabled"] == "false"
    assert found["Library Version"] == "1.02.185 (2022-05-18)"
    assert "Data loop file" not in found
    assert "Pool Mode" not in found
    assert list(found)[-1] == "Engine"


def test_a_loop_file_has_no_more_than_its_file_system(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(b"")
    huge = POOL._replace(total_data_blocks=2**40)
    found = graph_status(
        tmp_path,
        "p",
        PoolPaths("d", str(file), "m", ""),
        huge,
        FEATURES,
        BASE,
        deferred_removal=False,
    )
    assert found.data.available < found.data.total - found.data.used


def test_without_the_pools_status_all_numbers_are_zero(tmp_path):
    found = status_of(None, PoolPaths("d", "", "m", ""), tmp_path)
    assert [value for name, value in found.items() if "Space" in name] == ["0 B"] * 7
    assert found["Pool Mode"] == "fail"


@pytest.mark.parametrize(
    ("mode", "needs_check", "row"),
    [
        (PoolMode.READ_ONLY, True, "ro, needs_check"),
        (PoolMode.OUT_OF_DATA_SPACE, False, "out_of_data_space"),
        (PoolMode.WRITE, True, "rw, needs_check"),
    ],
)
def test_a_pool_in_trouble_does_not_look_healthy(tmp_path, mode, needs_check, row):
    pool = POOL._replace(mode=mode, needs_check=needs_check)
    assert status_of(pool, PoolPaths("d", "", "m", ""), tmp_path)["Pool Mode"] == row


def test_status_of_a_layer_is_in_sectors():
    thin = ThinStatus(ThinId(7), 3, 9, TransactionId(2), 0, 0)
    assert dev_status(Bytes(GIB), thin, 5, Bytes(65536)) == DevStatus(
        7, Bytes(GIB), 5, 2097152, 384, 1279
    )
    empty = thin._replace(mapped_blocks=0, highest_mapped_block=None)
    assert dev_status(Bytes(GIB), empty, 5, Bytes(65536))[-2:] == (0, 0)


def test_mount_options_come_in_dockers_order():
    assert mount_options("ext4", (), "") == (MountFlag(0), "")
    assert mount_options("xfs", ("discard,noatime", "x=1"), "u:r:t:s0:c1,c2") == (
        MountFlag.NOATIME,
        'nouuid,discard,x=1,context="u:r:t:s0:c1,c2"',
    )
    assert mount_options("ext4", ("ro,nodev", "rw"), "").flags == MountFlag.NODEV


@pytest.mark.parametrize("label", ['u:r:t:s0"', 'a",ro,context="b', "u:r:t\n", "u:r:t\0"])
def test_a_label_that_would_leave_its_quotes_is_refused(label):
    with pytest.raises(UsageError, match="no SELinux label"):
        mount_options("ext4", (), label)


def test_more_options_than_a_mount_takes_are_refused():
    """The kernel would cut them off, and with them the label."""
    assert mount_options("ext4", ("x" * 4095,), "").data == "x" * 4095
    with pytest.raises(UsageError, match="4096 bytes"):
        mount_options("ext4", ("x" * 4096,), "")
    with pytest.raises(UsageError, match="4096 bytes"):
        mount_options("ext4", ("x" * 4080,), "u:r:t")


@pytest.mark.parametrize(
    ("super_options", "label"),
    [
        ("rw,seclabel", ""),
        ('rw,context="u:r:t:s0:c1,c2",discard', "u:r:t:s0:c1,c2"),
        ("rw,context=u:r:t:s0,discard", "u:r:t:s0"),
        ("rw,fscontext=u:r:x,defcontext=u:r:y,rootcontext=u:r:z", ""),
        ("context=u:r:t", "u:r:t"),
    ],
)
def test_the_label_of_a_mount_is_read_back(super_options, label):
    assert label_of(super_options) == label


def test_what_an_engine_lacks_is_refused():
    with pytest.raises(UsageError, match=r"dm\.thinpooldev"):
        check_engine(FEATURES._replace(name="embedded"), parse_options(["dm.thinpooldev=x"]))
    check_engine(FEATURES, parse_options(["dm.thinpooldev=x"]))
    lacking = FEATURES._replace(deferred_removal=False)
    with pytest.raises(EnvironmentLacking, match="deferred removal"):
        check_engine(lacking, parse_options(["dm.use_deferred_removal=true"]))
    unsynced = FEATURES._replace(udev_sync=False)
    with pytest.raises(EnvironmentLacking, match="udev"):
        check_engine(unsynced, parse_options([]))
    check_engine(unsynced, parse_options(["dm.override_udev_sync_check=true"]))


def test_an_option_that_has_no_meaning_is_mentioned(caplog):
    caplog.set_level("INFO")
    features = FEATURES._replace(name="embedded", udev_sync=False, udev_sync_needed=False)
    check_engine(features, parse_options(["dm.override_udev_sync_check=true"]))
    assert "no udev to wait for" in caplog.text


def test_the_librarys_log_is_shown_from_fatal_on(tmp_path, caplog):
    caplog.set_level("DEBUG")
    engine = LocalEngine()
    with open_small(tmp_path, engine) as devices:
        devices.dm_log(2, "ioctl.c", 7, 16, "device is busy")
        devices.dm_log(4, "ioctl.c", 8, 0, "a warning")
        devices.dm_log(7, "ioctl.c", 9, 0, "chatter")
    engine.crash()
    shown = {r.getMessage(): r.levelname for r in caplog.records if "libdevmapper" in r.message}
    assert shown == {
        "libdevmapper(2): ioctl.c:7 (16) device is busy": "ERROR",
        "libdevmapper(4): ioctl.c:8 (0) a warning": "DEBUG",
    }
