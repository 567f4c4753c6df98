"""Graphs that dockerd 20.10 made: opened here, their containers are what Docker exported.

`docker export` left nothing out of these containers, not even the files that Docker itself mounts
over (`/etc/hosts`, `/dev/console` …), so both sides are compared whole.
"""

import json
from pathlib import Path

import pytest

import devmapper
from devmapper.errors import LayerNotFound
from devmapper.units import human_size
from tests.support import export_tree, fixtures, thin_tools

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

CONTAINERS = ("c1", "c2", "c3")


@pytest.fixture(params=fixtures.DOCKER_GRAPHS)
def folder(request, tmp_path):
    return fixtures.unpack_docker_graph(request.param, tmp_path)


@pytest.fixture
def driver(folder):
    driver = devmapper.init(folder / "graph" / "devicemapper", engine="embedded")
    yield driver
    if driver.devices.is_open:
        driver.cleanup()


def layer_of(folder: Path, container: str) -> str:
    """The layer of a container: `docker inspect` gives its id, Docker's layer store the rest."""
    inspected = json.loads((folder / "expected" / f"{container}.json").read_text())[0]
    mounts = folder / "graph" / "image" / "devicemapper" / "layerdb" / "mounts"
    return (mounts / str(inspected["Id"]) / "mount-id").read_text()


def info_of(folder: Path) -> dict[str, str]:
    """What `docker info` printed of the driver."""
    lines = (folder / "expected" / "info.txt").read_text().splitlines()
    pairs = (line.strip().partition(": ") for line in lines)
    return {key: value for key, _, value in pairs}


def records_of(folder: Path) -> dict[str, bytes]:
    metadata = folder / "graph" / "devicemapper" / "metadata"
    return {path.name: path.read_bytes() for path in metadata.iterdir()}


def test_containers_are_what_docker_exported(folder, driver):
    for container in CONTAINERS:
        layer = layer_of(folder, container)
        expected = export_tree.of_tar(folder / "expected" / f"{container}.tar")
        assert len(expected) > 200
        try:
            found = export_tree.of_tree(Path(driver.get(layer)))
        finally:
            driver.put(layer)
        assert found.keys() == expected.keys()
        assert {name: found[name] for name in found if found[name] != expected[name]} == {}


def test_what_docker_said_of_them_is_what_we_say(folder, driver):
    rows = dict(driver.status())
    info = info_of(folder)
    for row in (
        "Pool Blocksize",
        "Data Space Used",
        "Data Space Total",
        "Metadata Space Total",
    ):
        assert rows[row].replace(" ", "") == info[row], row
    # The kernel's status counts as used what it keeps back to delete with when metadata are full
    # (dm-thin-metadata.c: set_metadata_reserve): 4 MiB, or a tenth of a smaller device
    usage = driver.devices.status().metadata
    reserve = min(1024, usage.total // 4096 // 10) * 4096
    assert human_size(usage.used + reserve).replace(" ", "") == info["Metadata Space Used"]
    for container in CONTAINERS:
        inspected = json.loads((folder / "expected" / f"{container}.json").read_text())[0]
        data = inspected["GraphDriver"]["Data"]
        found = driver.get_metadata(layer_of(folder, container))
        assert found["DeviceId"] == data["DeviceId"]
        assert found["DeviceSize"] == data["DeviceSize"]
        # The prefix comes from the inode of the home, which is another one here
        assert found["DeviceName"].split("-")[3:] == data["DeviceName"].split("-")[3:]
    assert list(driver.devices.inconsistencies()) == []


def test_opening_and_reading_change_no_record(folder, driver):
    before = records_of(folder)
    layer = layer_of(folder, "c2")
    driver.get(layer)
    driver.put(layer)
    driver.cleanup()
    assert records_of(folder) == before
    assert thin_tools.thin_check(folder / "graph" / "devicemapper" / "devicemapper" / "metadata")


def test_a_graph_of_dockers_is_worked_on(folder, driver):
    """A new container's layer on Docker's, changed, compared, removed; the next id follows."""
    parent = layer_of(folder, "c3")
    driver.create("mine", parent)
    assert driver.get_metadata("mine")["DeviceId"] == "19"
    root = Path(driver.get("mine"))
    (root / "etc" / "mine").write_text("written here")
    (root / "srv" / "new").unlink()
    driver.put("mine")
    found = [(change.path, change.kind.name) for change in driver.changes("mine", parent)]
    assert found == [
        ("/etc", "MODIFY"),
        ("/etc/mine", "ADD"),
        ("/srv", "MODIFY"),
        ("/srv/new", "DELETE"),
    ]
    record = json.loads(records_of(folder)["mine"])
    assert list(record) == ["device_id", "size", "transaction_id", "initialized", "deleted"]
    assert record["transaction_id"] == 25
    driver.remove("mine")
    with pytest.raises(LayerNotFound):
        driver.get("mine")
    driver.cleanup()
    assert "mine" not in records_of(folder)
    assert json.loads(records_of(folder)["deviceset-metadata"])["next_device_id"] == 19
    assert thin_tools.thin_check(folder / "graph" / "devicemapper" / "devicemapper" / "metadata")
