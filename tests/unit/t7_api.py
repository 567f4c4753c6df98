"""The public names: the seed's, all of them, loaded only when they are used."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import devmapper
from devmapper.units import GIB

PAGE = Path(__file__).parents[2] / "docs" / "internals" / "compatibility.md"
ROWS = re.findall(r"^\| `([\w.]+)` \| `devmapper\.([\w.]+)` \|$", PAGE.read_text(), re.MULTILINE)


def test_the_table_is_whole():
    assert len(ROWS) == len({go for go, _ in ROWS}) > 70


@pytest.mark.parametrize(("go", "python"), ROWS)
def test_every_name_of_the_seed_is_there(go, python):
    found = devmapper
    for part in python.split("."):
        assert hasattr(found, part), f"{go}: devmapper.{python} is missing"
        found = getattr(found, part)


def test_all_names_the_public_ones():
    assert sorted(devmapper.__all__, key=str.lower) == sorted(devmapper._HOMES, key=str.lower)
    assert {python.split(".")[0] for _, python in ROWS} == set(devmapper.__all__)
    assert set(devmapper.__all__) <= set(dir(devmapper))
    with pytest.raises(AttributeError, match="no_such_name"):
        devmapper.no_such_name  # noqa: B018


def test_constants_are_the_seeds():
    assert devmapper.DEFAULT_DATA_LOOPBACK_SIZE == 100 * GIB
    assert devmapper.DEFAULT_META_DATA_LOOPBACK_SIZE == 2 * GIB
    assert devmapper.DEFAULT_BASE_FS_SIZE == 10 * GIB
    assert devmapper.DEFAULT_THINP_BLOCK_SIZE == 128
    assert devmapper.DEFAULT_UDEV_SYNC_OVERRIDE is False
    assert devmapper.MAX_DEVICE_ID == 0xFFFFFF
    assert devmapper.DEVICE_ID_MAP_SZ == 0x1000000 // 8
    assert devmapper.DM_LOG_LEVEL == 2
    assert devmapper.DRIVER_DEFERRED_REMOVAL_SUPPORT is False
    assert devmapper.ENABLE_DEFERRED_REMOVAL is False


def test_public_functions_and_methods_are_documented():
    for name in devmapper.__all__:
        value = getattr(devmapper, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


def test_importing_the_package_loads_nothing_else():
    code = "import sys, devmapper; print([m for m in sys.modules if m.startswith('devmapper.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
