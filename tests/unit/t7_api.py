"""The public names: the seed's, all of them, loaded only when they are used."""

import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import devmapper
from devmapper.units import GIB

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
TABLE = re.findall(
    r"^\| `([\w.]+)` \| `devmapper\.([\w.]+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE
)
ROWS = [(go, python) for go, python, _ in TABLE]

# Every exported name of Docker's package at 1.7.1-rc3, members behind a dot
SEED = """
DefaultDataLoopbackSize DefaultMetaDataLoopbackSize DefaultBaseFsSize DefaultThinpBlockSize
DefaultUdevSyncOverride MaxDeviceId DeviceIdMapSz DMLogLevel
DriverDeferredRemovalSupport EnableDeferredRemoval Init Mounted
ProbeFsType NewDeviceSet DeviceSet DeviceSet.TransactionId
DeviceSet.NextDeviceId DeviceSet.AddDevice DeviceSet.DMLog DeviceSet.DataDevicePath
DeviceSet.DeleteDevice DeviceSet.GetDeviceStatus DeviceSet.HasActivatedDevice DeviceSet.HasDevice
DeviceSet.List DeviceSet.MetadataDevicePath DeviceSet.MountDevice DeviceSet.ResizePool
DeviceSet.Shutdown DeviceSet.Status DeviceSet.UnmountDevice Driver
Driver.Cleanup Driver.Create Driver.Exists Driver.Get
Driver.Put Driver.Remove Driver.Status Driver.String
DevInfo DevInfo.Hash DevInfo.DeviceId DevInfo.Size
DevInfo.TransactionId DevInfo.Initialized DevInfo.DevName DevInfo.Name
DevStatus DevStatus.DeviceId DevStatus.Size DevStatus.TransactionId
DevStatus.SizeInSectors DevStatus.MappedSectors DevStatus.HighestMappedSector Status
Status.PoolName Status.DataFile Status.DataLoopback Status.MetadataFile
Status.MetadataLoopback Status.Data Status.Metadata Status.SectorSize
Status.UdevSyncSupported Status.DeferredRemoveEnabled DiskUsage DiskUsage.Used
DiskUsage.Total DiskUsage.Available MetaData MetaData.Devices
Transaction Transaction.OpenTransactionId Transaction.DeviceIdHash Transaction.DeviceId
""".split()  # noqa: SIM905 - shorter, and as the page has them

# Rows that show a call, such as "`list() -> list[str]`; all layers"
CALLS = [
    (python, call[1])
    for _, python, words in TABLE
    if (call := re.match(rf"`{python.split('.')[-1]}\((.*?)\)(?: -> [^`]+)?`", words))
]


def test_the_page_has_every_name_of_the_seed_once():
    assert sorted(go for go, _ in ROWS) == sorted(SEED)


@pytest.mark.parametrize(("go", "python"), ROWS)
def test_every_name_of_the_seed_is_there(go, python):
    found = devmapper
    for part in python.split("."):
        assert hasattr(found, part), f"{go}: devmapper.{python} is missing"
        found = getattr(found, part)


@pytest.mark.parametrize(("python", "shown"), CALLS)
def test_calls_are_spelled_as_they_are(python, shown):
    """A parameter that the page shows is there, in this order and with this default."""
    found = functools.reduce(getattr, python.split("."), devmapper)
    assert callable(found)
    actual = [p for p in inspect.signature(found).parameters.values() if p.name != "self"]
    words = [word for word in shown.split(", ") if word not in ("", "*", "…")]
    assert len(actual) >= len(words) if "…" in shown else len(actual) == len(words)
    for word, parameter in zip(words, actual, strict=False):
        name, has_default, default = word.partition("=")
        assert parameter.name == name
        assert (parameter.default is not inspect.Parameter.empty) is bool(has_default)
        if has_default:
            assert repr(parameter.default).replace("'", '"') == default


def test_most_calls_are_shown():
    assert len(CALLS) > 25


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


def look_up(python: str) -> object:
    return functools.reduce(getattr, python.split("."), devmapper)


DOCUMENTED = [
    python
    for _, python in ROWS
    if callable(look_up(python)) or isinstance(look_up(python), property)
]


@pytest.mark.parametrize("python", DOCUMENTED)
def test_what_can_be_called_says_whose_behaviour_it_follows(python):
    text = inspect.getdoc(
        devmapper.DeviceSet.__init__ if python == "DeviceSet" else look_up(python)
    )
    assert text
    if python not in ("Driver", "MetaData", "Transaction"):  # values, and a class of such methods
        assert "moby" in text, f"{python}: {text}"


def test_importing_the_package_loads_nothing_else():
    code = "import sys, devmapper; print([m for m in sys.modules if m.startswith('devmapper.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
