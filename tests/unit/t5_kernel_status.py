"""Status lines and table lines of the kernel, as text; no device mapper is needed."""

from pathlib import Path

import pytest

from devmapper.engine.kernel import status, tableline
from devmapper.engine.kernel.status import parse_pool, parse_thin
from devmapper.engine.port import PoolMode, PoolTable
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.libdm import Target
from devmapper.units import KIB, MIB, Bytes, Sectors, ThinId, TransactionId

# As Linux 6.1 printed them
HEALTHY = "7 215/2048 12/8192 - rw discard_passdown queue_if_no_space - 512 "
CHECK = "0 215/2048 0/8192 - ro discard_passdown queue_if_no_space needs_check 512 "
FULL = "1 218/2048 256/256 1044 out_of_data_space no_discard_passdown error_if_no_space - 512 "


def test_a_healthy_pool():
    assert parse_pool(HEALTHY) == status.PoolLine(
        transaction_id=TransactionId(7),
        used_metadata_blocks=215,
        total_metadata_blocks=2048,
        used_data_blocks=12,
        total_data_blocks=8192,
        held_metadata_root=None,
        mode=PoolMode.WRITE,
        needs_check=False,
        error_if_no_space=False,
        discard_passdown=True,
        ignore_discard=False,
        metadata_low_water=512,
    )


def test_modes_and_flags():
    assert (parse_pool(CHECK).mode, parse_pool(CHECK).needs_check) == (PoolMode.READ_ONLY, True)
    full = parse_pool(FULL)
    assert full.mode is PoolMode.OUT_OF_DATA_SPACE
    assert full.held_metadata_root == 1044
    assert full.error_if_no_space
    assert not full.discard_passdown
    assert not full.ignore_discard
    ignoring = parse_pool(HEALTHY.replace("discard_passdown", "ignore_discard"))
    assert ignoring.ignore_discard
    assert not ignoring.discard_passdown


@pytest.mark.parametrize("line", ["Fail", "Error", "Fail "])
def test_a_pool_that_cannot_be_asked(line):
    found = parse_pool(line)
    assert found.mode is PoolMode.FAIL
    assert sum(found[:5]) == 0
    assert found.held_metadata_root is None


def test_older_kernels_say_less():
    assert parse_pool("7 215/2048 12/8192 -").mode is PoolMode.WRITE
    middle = parse_pool("7 215/2048 12/8192 - ro discard_passdown queue_if_no_space")
    assert middle.mode is PoolMode.READ_ONLY
    assert not middle.needs_check
    assert middle.metadata_low_water is None


@pytest.mark.parametrize(
    "line",
    ["", "7", "7 215/2048 12/8192", "x 1/2 3/4 -", "7 215 12/8192 -", "7 1/2 3/4 - sideways x y"],
)
def test_what_is_no_status_of_a_pool(line):
    with pytest.raises(ValueError, match=r"."):
        parse_pool(line)


def test_thin_devices():
    assert parse_thin("1024 1023") == status.ThinLine(1024, 1023)
    assert parse_thin("0 -") == status.ThinLine(0, None)
    for line in ("Fail", "Error", "-", ""):
        assert parse_thin(line) is None
    with pytest.raises(ValueError, match="expected 2"):
        parse_thin("1 2 3")


TABLE = PoolTable(
    Path("/dev/loop0"), Path("/dev/loop1"), Bytes(512 * MIB), block_size=Bytes(64 * KIB)
)


def test_the_line_of_a_pool_is_mobys():
    assert tableline.pool_target(TABLE) == Target(
        Sectors(0),
        Sectors(1048576),
        "thin-pool",
        "/dev/loop0 /dev/loop1 128 32768 1 skip_block_zeroing",
    )


FEATURES = PoolTable._fields[5:]


@pytest.mark.parametrize("number", range(2 ** len(FEATURES)))
def test_features_there_and_back(number):
    chosen = [bool(number >> at & 1) for at in range(len(FEATURES))]
    table = PoolTable(*TABLE[:4], 7, *chosen)
    target = tableline.pool_target(table)
    words = target.params.split()
    assert words[3:5] == ["7", str(len(words) - 5)]
    # The kernel gives the devices back by number
    asked = target._replace(params=" ".join(["7:0", "7:1", *words[2:], ""]))
    line = tableline.parse_pool(asked)
    assert (line.metadata_device, line.data_device) == (DeviceNumber(7, 0), DeviceNumber(7, 1))
    assert line.table(table.metadata_device, table.data_device) == table


def test_the_line_of_a_thin_device():
    target = tableline.thin_target("pool", ThinId(7), Bytes(64 * MIB))
    assert target == Target(Sectors(0), Sectors(131072), "thin", "/dev/mapper/pool 7")
    line = tableline.parse_thin(target._replace(params="254:3 7"))
    assert line == tableline.ThinLine(DeviceNumber(254, 3), ThinId(7), Sectors(131072))
    assert line.size == 64 * MIB


def test_lines_of_other_targets():
    other = Target(Sectors(0), Sectors(8), "linear", "7:0 0")
    for parse in (tableline.parse_pool, tableline.parse_thin):
        with pytest.raises(ValueError, match="no table of a"):
            parse(other)
    with pytest.raises(ValueError, match="no device number"):
        tableline.parse_thin(other._replace(kind="thin", params="/dev/sda 1"))
