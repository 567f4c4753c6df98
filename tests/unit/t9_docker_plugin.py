"""Docker's plugin: its wire, its statuses, and what it makes of a shared graph.

On an engine whose devices are files; what needs a mount is in tests/e2e/test_docker_plugin.py.
"""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from devmapper.deviceset.id_maps import IdMap
from devmapper.deviceset.options import OPTION_NAMES, Options
from devmapper.driver import Driver
from devmapper.errors import LayerError, LayerExists, UsageError
from devmapper.server.docker import wire
from devmapper.server.docker.agreement import FIELDS
from devmapper.server.docker.service import DockerPlugin
from devmapper.server.docker.transfers import Transfers
from devmapper.server.docker.wording import sentence
from devmapper.server.operations import Operations
from tests.support.graphs import BASE_SIZE, SMALL, open_small
from tests.support.local_engine import LocalEngine
from tests.support.plugin_client import ACCEPT, PluginClient


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine()
    yield engine
    engine.crash()


@pytest.fixture
def driver(tmp_path: Path, engine: LocalEngine) -> Iterator[Driver]:
    with Driver(open_small(tmp_path / "graph", engine)) as driver:
        yield driver


@pytest.fixture
def operations() -> Operations:
    return Operations()


@pytest.fixture
def client(tmp_path: Path, driver: Driver, operations: Operations) -> Iterator[PluginClient]:
    socket = tmp_path / "p.sock"
    plugin = DockerPlugin(driver, socket, operations)
    plugin.start()
    try:
        yield PluginClient(socket)
    finally:
        plugin.stop(5.0)
    assert not socket.exists()


# The wire


@pytest.mark.parametrize(
    ("accept", "answered"),
    [
        ("application/vnd.docker.plugins.v1+json", "application/vnd.docker.plugins.v1+json"),
        ("application/vnd.docker.plugins.v1.1+json", "application/vnd.docker.plugins.v1.1+json"),
        ("application/vnd.docker.plugins.v1.2+json", wire.NEWEST),
        ("application/vnd.docker.plugins.v1.7+json", wire.NEWEST),
        ("text/html, application/vnd.docker.plugins.v1+json;q=0.5", f"{wire.NEWEST[:33]}+json"),
        ("*/*", wire.NEWEST),
        ("", wire.NEWEST),
        ("application/vnd.docker.plugins.v2+json", None),
        ("text/html", None),
    ],
)
def test_versions(accept, answered):
    assert wire.reply_type(accept) == answered


def test_members_match_in_any_case_and_may_be_null():
    raw = b'{"Id": "old", "iD": "a", "PARENT": null, "storageopt": {"size": "1G"}, "New": 1}'
    assert wire.decode_layer(raw) == ("a", "", "", {"size": "1G"})


@pytest.mark.parametrize("spelling", [("container_id", "host_id", "size"),
                                      ("ContainerID", "HostID", "Size")])  # fmt: skip
def test_id_maps_in_both_spellings(spelling):
    one = dict(zip(spelling, (0, 100000, 65536), strict=True))
    found = wire.decode_init(json.dumps({"Home": "/h", "UIDMaps": [one], "GIDMaps": None}).encode())
    assert found == ("/h", (), (IdMap(0, 100000, 65536),), ())


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "has no body"),
        (b"  ", "has no body"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b"{}", "names no layer"),
        (b'{"ID": ""}', "names no layer"),
        (b'{"ID": 7}', "'ID' of the request holds 7, expected a string"),
        (b'{"ID": ["a"]}', "expected a string"),
        (b'{"ID": "a", "Parent": {}}', "'Parent'"),
        (b'{"ID": "a", "StorageOpt": []}', "expected an object"),
        (b'{"ID": "a", "StorageOpt": {"size": 1}}', "expected strings"),
    ],
)
def test_requests_that_are_not_understood(client, raw, reason):
    reply = client.send("/GraphDriver.Create", raw)
    assert reply.status == 400
    assert reason in reply.error
    assert len(reply.error) < 300


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"Opts": "dm.fs=xfs"}, "'Opts'"),
        ({"Opts": [1]}, "expected strings"),
        ({"UIDMaps": {}}, "expected an array"),
        ({"UIDMaps": [1]}, "expected objects"),
        ({"GIDMaps": [{"container_id": "0"}]}, "expected whole numbers"),
        ({"GIDMaps": [{"size": True}]}, "expected whole numbers"),
    ],
)
def test_a_start_that_is_not_understood(client, members, reason):
    reply = client.send("/GraphDriver.Init", json.dumps(members).encode())
    assert reply.status == 400
    assert reason in reply.error


def test_other_methods_paths_and_types(client):
    reply = client.send("/GraphDriver.Exists", method="GET", body=b"")
    assert (reply.status, reply.error) == (405, "GraphDriver.Exists takes POST, not GET")
    reply = client.send("/GraphDriver.Nonsense")
    assert (reply.status, reply.error) == (404, "there is no endpoint '/GraphDriver.Nonsense'")
    assert client.send("/../../etc/passwd").status == 404
    reply = client.send("/GraphDriver.Status", accept="application/vnd.docker.plugins.v2+json")
    assert reply.status == 406
    assert wire.NEWEST in reply.error
    reply = client.send("/GraphDriver.Status", accept=None)
    assert reply.content_type == wire.NEWEST


def test_a_body_that_is_too_large(client):
    reply = client.send("/GraphDriver.Create", b'{"ID": "' + b"a" * wire.MAX_REQUEST + b'"}')
    assert (reply.status, reply.error) == (413, "the request has more than 1048576 bytes")
    assert client("Exists", ID="a") == {"Exists": False}


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"POST /GraphDriver.Exists\r\n\r\n",
        b"POST /GraphDriver.Exists HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /GraphDriver.Exists HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    ],
)
def test_malformed_http(client, raw):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(client.socket))
        connection.sendall(raw)
        answer = connection.recv(65536)
    assert answer == b"" or answer.startswith(b"HTTP/1.0 400 ") or b" 400 " in answer[:15]
    assert client("Exists", ID="a") == {"Exists": False}


# Calls


def test_activate_and_capabilities(client):
    reply = client.send("/Plugin.Activate", b"")
    assert (reply.status, reply.json) == (200, {"Implements": ["GraphDriver"]})
    assert reply.content_type == ACCEPT
    assert client("Capabilities") == {"Capabilities": {"ReproducesExactDiffs": False}}


def test_layers(client, driver):
    assert client("Create", ID="one") == {}
    assert client("CreateReadWrite", ID="two", Parent="one", StorageOpt={"size": "8M"}) == {}
    assert client("Exists", ID="two") == {"Exists": True}
    assert client("GetMetadata", ID="two") == {"Metadata": driver.get_metadata("two")}
    assert client("Status") == {"Status": [list(row) for row in driver.status()]}
    owners = {json.loads((driver.home / "metadata" / name).read_text())["owner"]
              for name in ("one", "two")}  # fmt: skip
    assert owners == {"docker"}
    assert client("Remove", ID="two") == {}
    assert client("Remove", ID="two") == {}
    assert client("Exists", ID="two") == {"Exists": False}
    assert driver.layers() == ["one"]


def test_errors_are_one_sentence_with_a_hint(client):
    client("Create", ID="one")
    assert client.error("Create", ID="one") == ("layer 'one' already exists (choose another id)")
    assert "layer 'none' does not exist" in client.error("Create", ID="two", Parent="none")
    assert "does not exist" in client.error("Get", ID="none")
    assert "does not exist" in client.error("Put", ID="none")
    assert "does not exist" in client.error("GetMetadata", ID="none")
    assert "does not exist" in client.error("Changes", ID="none", Parent="one")
    assert "does not exist" in client.error("DiffSize", ID="one", Parent="none")
    assert "storage option 'sise' of a layer is unknown" in client.error(
        "Create", ID="two", StorageOpt={"sise": "1G"}
    )
    for name in ("../up", "a/b", ".hidden", "base", "a\0b", "x" * 256, "deviceset-metadata"):
        assert "layer id" in client.error("Create", ID=name)
        assert "layer id" in client.error("Remove", ID=name)
    assert client("Put", ID="one") == {}  # what is not mounted is put already


def test_diff_of_a_layer_that_is_not_there_is_no_tar(client):
    reply = client.send("/GraphDriver.Diff", b'{"ID": "none"}')
    assert reply.status == 500  # Docker would take the body of a 200 for the tar
    assert "does not exist" in reply.error
    assert client.send("/GraphDriver.Diff", b"{}").status == 400
    assert client.send("/GraphDriver.ApplyDiff", b"").status == 400
    assert "does not exist" in client.apply("none", b"").error


def test_layers_of_containerd_are_not_dockers(client, driver):
    driver.create("theirs", owner="containerd")
    driver.create("nobodys")
    assert client("Exists", ID="theirs") == {"Exists": False}
    assert client("Exists", ID="nobodys") == {"Exists": True}
    assert "does not exist" in client.error("Create", ID="mine", Parent="theirs")
    assert "does not exist" in client.error("Get", ID="theirs")
    assert client("Remove", ID="theirs") == {}
    assert driver.exists("theirs")
    assert "already exists" in client.error("Create", ID="theirs")
    client("Create", ID="mine", Parent="nobodys")


def test_operations_are_counted(client, operations):
    client("Create", ID="one")
    client.error("Create", ID="one")
    value = operations.registry.get_sample_value
    labels = {"front_end": "docker", "operation": "Create"}
    assert value("devmapper_operation_duration_seconds_count", labels) == 2
    errors = {**labels, "error": LayerExists.__name__}
    assert value("devmapper_operation_errors_total", errors) == 1


def test_a_thousand_requests_at_once(client, driver):
    """Each creates a layer, or asks for one; no connection is refused, no request is lost."""

    def one(number: int) -> bool:
        if number % 20:
            return bool(client("Exists", ID="parent")["Exists"])
        client("Create", ID=f"layer-{number}", Parent="parent")
        return True

    client("Create", ID="parent")
    with ThreadPoolExecutor(200) as threads:
        assert all(threads.map(one, range(1000)))
    assert len(driver.layers()) == 51


# The start of a dockerd


def test_options_have_to_be_those_of_the_graph(client, driver):
    assert client("Init", Home="/var/lib/docker/devmapper") == {}
    same = [*SMALL, f"dm.basesize={BASE_SIZE}", "dm.blkdiscard=true", "dm.blocksize=64K",
            "dm.override_udev_sync_check=false", "dm.libdm_log_level=2"]  # fmt: skip
    assert client("Init", Home="/h", Opts=same) == {}
    error = client.error("Init", Home="/h", Opts=["dm.basesize=1G", "dm.fs=xfs", SMALL[0]])
    assert error == (
        "storage options differ from those of the open graph: dm.basesize, dm.fs"
        " (set them in the daemon's configuration (storage-opts), not in Docker's)"
    )
    assert "storage option 'dm.nosuch' is unknown" in client.error("Init", Opts=["dm.nosuch=1"])
    assert "has no value" in client.error("Init", Opts=["dm.fs"])
    assert driver.devices.is_open


def test_every_option_can_be_compared():
    assert set(FIELDS) == set(OPTION_NAMES)
    fields = set(Options.__dataclass_fields__)
    assert set(FIELDS.values()) == fields - {"given"}


def test_id_maps_have_to_be_those_of_the_graph(client):
    none = {"container_id": 0, "host_id": 0, "size": 65536}
    assert client("Init", UIDMaps=[none], GIDMaps=[none]) == {}
    maps = [{**none, "host_id": 100000}]
    assert "100000:100000 on the host, but the graph belongs to 0:0" in client.error(
        "Init", UIDMaps=maps, GIDMaps=maps
    )
    assert "have no root" in client.error("Init", UIDMaps=[{**none, "container_id": 1}])


def test_cleanup_leaves_the_graph_open(client, driver):
    client("Create", ID="one")
    assert client("Cleanup") == {}
    assert driver.exists("one")
    assert client("Exists", ID="one") == {"Exists": True}


# Its parts


def test_a_layer_takes_one_transfer(tmp_path):
    transfers = Transfers(tmp_path / "transfers")
    with transfers.into("a"), pytest.raises(LayerError, match="part of another transfer"):
        transfers.into("a").__enter__()
    with transfers.into("a"):
        pass  # the one before is complete
    with pytest.raises(ZeroDivisionError), transfers.into("b"):
        raise ZeroDivisionError
    again = Transfers(tmp_path / "transfers")  # as after a SIGKILL
    with pytest.raises(LayerError), again.into("b"):
        pass
    again.forget("b")
    again.forget("b")
    with again.into("b"):
        pass


def test_words_of_errors():
    assert sentence(UsageError("no", hint="do so")) == "no (do so)"
    assert sentence(OSError(28, "No space left on device", "/x")) == "'/x': No space left on device"
    noted = UsageError("no")
    noted.add_note("it stays\nmounted")
    assert sentence(noted) == "no; it stays mounted"
    assert sentence(KeyError("x")) == "internal error: KeyError: 'x' (see the daemon's log)"
