"""A graph that Docker and we have in turn: what each of them sees in it, and what both need."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import devmapper
from devmapper.deviceset import records
from devmapper.deviceset.names import DEVICESET_METADATA, TRANSACTION_METADATA, LayerId
from devmapper.deviceset.records import RecordStore
from devmapper.driver import Driver
from devmapper.engine.select import Preference
from tests.support import export_tree
from tests.support.export_tree import Inode
from tests.support.thin_tools import thin_check

Tree = dict[str, Inode]

# What dockerd was given, but for the file system: an initialised graph has one
ENGINE: Final[Preference] = "kernel"
OPTIONS = (
    "dm.loopdatasize=1G",
    "dm.loopmetadatasize=16M",
    "dm.basesize=64M",
    "dm.override_udev_sync_check=true",
)


@contextmanager
def ours(home: Path, engine: Preference = ENGINE) -> Iterator[Driver]:
    """The graph in our hands; afterwards nothing of it is active, and its pool is sound."""
    driver = devmapper.init(home, OPTIONS, engine=engine)
    try:
        yield driver
        check_agreement(driver)
    finally:
        if driver.devices.is_open:
            driver.cleanup()
    check_pool(home)


def check_pool(home: Path) -> None:
    """thin_check of a pool that is not active."""
    checked = thin_check(home / "devicemapper" / "metadata")
    assert checked, checked.output


def check_agreement(driver: Driver) -> None:
    """Every record has its thin device, every thin device its record, and no two share one."""
    listed = driver.devices.meta_data().devices.values()
    ids = [info.device_id for info in listed]
    assert len(ids) == len(set(ids)), "two layers share a thin id"
    driver.devices.pool.commit()
    assert set(ids) == set(driver.devices.pool.thin_ids())
    assert list(driver.devices.inconsistencies()) == []


def check_spelling(home: Path) -> int:
    """Every file of records is to the byte what we would write; returns how many layers it has."""
    folder = home / "metadata"
    store = RecordStore(folder)
    layers = list(store.layers())
    for layer in layers:
        record = store.load(layer)
        assert record is not None
        name = layer or "base"
        assert (folder / name).read_bytes() == records.encode_layer(record)
        assert record.extra == ()
    deviceset = store.load_deviceset()
    assert (folder / DEVICESET_METADATA).read_bytes() == records.encode_deviceset(deviceset)
    transaction = store.load_transaction()
    if transaction is not None:
        found = (folder / TRANSACTION_METADATA).read_bytes()
        assert found == records.encode_transaction(transaction)
    return len(layers)


def tree(driver: Driver, layer: str) -> Tree:
    """What a layer holds."""
    try:
        return export_tree.of_tree(Path(driver.get(layer)))
    finally:
        driver.put(layer)


def assert_same(found: Tree, expected: Tree) -> None:
    assert found.keys() == expected.keys()
    assert {name: found[name] for name in found if found[name] != expected[name]} == {}


def write(driver: Driver, layer: str, files: dict[str, bytes]) -> None:
    """Write files into a layer; `put` makes them durable."""
    root = Path(driver.get(layer))
    try:
        for name, content in files.items():
            (root / name).write_bytes(content)
    finally:
        driver.put(layer)


def keys_of(home: Path, layer: str) -> list[str]:
    """The keys of a layer's record, in their order on disk."""
    return list(json.loads((home / "metadata" / LayerId(layer)).read_bytes()))
