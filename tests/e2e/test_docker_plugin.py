"""Docker's plugin in a real daemon: mounts, tars in both directions, and clients that go away."""

import contextlib
import http.client
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, served
from tests.support.docker_plugin import mounted_layers
from tests.support.plugin_client import PluginClient
from tests.support.unix_http import UnixConnection
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.tools, pytest.mark.e2e]

MIB = 1 << 20
OPTIONS = ("dm.loopdatasize=2G", "dm.loopmetadatasize=16M", "dm.basesize=1G")
CONSTANT = 40 * MIB  # what a stream may take of memory, however long it is
_SECONDS = 20.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with served(tmp_path, storage_options=OPTIONS, docker=True, check_log=False) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> PluginClient:
    return PluginClient(daemon.docker)


def tar_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def long_tar(mebibytes: int, piece: bytes = b"") -> Iterator[bytes]:
    """A tar of one file, in pieces."""
    member = tarfile.TarInfo("long")
    member.size = mebibytes * MIB
    yield member.tobuf()
    for _ in range(mebibytes):
        yield piece or os.urandom(MIB)
    yield bytes(1024)


def members(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return {
            member.name: (content.read() if (content := archive.extractfile(member)) else b"")
            for member in archive
        }


def make(client: PluginClient, layer: str, files: dict[str, bytes], parent: str = "") -> None:
    client("Create", ID=layer, Parent=parent)
    root = Path(client("Get", ID=layer)["Dir"])
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    client("Put", ID=layer)


def test_mounts_are_counted_over_a_restart(daemon, client):
    client("Create", ID="one")
    place = client("Get", ID="one")["Dir"]
    assert place == str(daemon.home / "mnt/one/rootfs")
    assert client("Get", ID="one")["Dir"] == place
    client("Put", ID="one")
    daemon.kill()
    daemon.start()
    assert mounted_layers(daemon.home) == {"one"}
    client("Put", ID="one")
    assert mounted_layers(daemon.home) == set()
    client("Put", ID="one")


def test_what_a_dockerd_has_left_goes_with_its_successor(daemon, client):
    for layer in ("used", "left", "removed", "theirs"):
        client("Create", ID=layer)
        for _ in range(3):
            client("Get", ID=layer)
    root = daemon.home / "mnt/used/rootfs"
    with open(root / "file", "wb"):
        assert "does not exist" in client.error("Get", ID="none")
        client("Init", Home="/h")
        assert mounted_layers(daemon.home) == {"used"}
    client("Get", ID="used")
    client("Put", ID="used")
    client("Put", ID="used")  # the one that was left
    assert mounted_layers(daemon.home) == set()

    for _ in range(3):
        client("Get", ID="removed")
    client("Remove", ID="removed")  # Docker knows that it does not use it
    assert client("Exists", ID="removed") == {"Exists": False}

    client("Get", ID="left")
    client("Get", ID="used")
    with open(root / "file", "rb"):
        assert "layer 'used' is busy" in client.error("Cleanup")
        assert mounted_layers(daemon.home) == {"used"}
        assert "busy" in client.error("Remove", ID="used")
    client("Cleanup")
    assert mounted_layers(daemon.home) == set()
    client("Get", ID="left")
    client("Cleanup")


def test_tars_in_both_directions(client):
    make(client, "one", {"a": b"1", "dir/b": b"2"})
    make(client, "two", {"a": b"three", "c": b""}, parent="one")
    tar = client.diff("two", "one")
    assert members(tar) == {"a": b"three", "c": b""}
    assert client("Changes", ID="two", Parent="one") == {
        "Changes": [{"Path": "/a", "Kind": 0}, {"Path": "/c", "Kind": 1}]
    }
    assert client("DiffSize", ID="two", Parent="one") == {"Size": 5}
    client("Create", ID="three", Parent="one")
    assert client.apply("three", tar, "one").json == {"Size": 5}
    assert client("Changes", ID="three", Parent="two") == {"Changes": []}
    assert set(members(client.diff("three"))) == {"a", "c", "dir", "dir/b"}
    client("Create", ID="empty")
    assert client.apply("empty", b"").json == {"Size": 0}  # an archive without entry, as for Docker


def test_long_tars_take_no_memory(daemon, client):
    client("Create", ID="one")
    before = daemon.rss()
    assert client.apply("one", long_tar(400, bytes(range(256)) * 4096)).json == {"Size": 400 * MIB}
    assert daemon.rss() - before < CONSTANT
    connection, reply = client.begin_diff("one")
    with contextlib.closing(connection):
        assert reply.headers["Transfer-Encoding"] == "chunked"
        time.sleep(0.5)  # a client that is slower than we are
        size = 0
        while piece := reply.read(MIB):
            size += len(piece)
    assert size > 400 * MIB
    assert daemon.rss() - before < CONSTANT
    assert mounted_layers(daemon.home) == set()


def test_a_client_that_leaves_amid_a_diff(daemon, client):
    make(client, "one", {"long": os.urandom(30 * MIB)})
    for _ in range(3):
        connection, reply = client.begin_diff("one")
        assert len(reply.read(MIB)) == MIB
        assert mounted_layers(daemon.home) == {"one"}
        reply.close()
        connection.close()
        wait_for(lambda: mounted_layers(daemon.home) == set())
    assert len(members(client.diff("one"))["long"]) == 30 * MIB


def test_slow_clients_do_not_stop_the_others(daemon, client):
    make(client, "one", {"long": os.urandom(8 * MIB)})
    slow = [client.begin_diff("one") for _ in range(40)]
    try:
        client("Create", ID="two", Parent="one")
        client("Get", ID="two")
        client("Put", ID="two")
    finally:
        for connection, reply in slow:
            reply.close()
            connection.close()
    wait_for(lambda: mounted_layers(daemon.home) == set())


def test_changes_in_many_pieces(client):
    """More of them than are sent at once."""
    names = [f"{number:04}" + "n" * 150 for number in range(2000)]
    make(client, "one", {"a": b"1"})
    make(client, "two", dict.fromkeys(names, b""), parent="one")
    added = [{"Path": f"/{name}", "Kind": 1} for name in names]
    assert client("Changes", ID="two", Parent="one") == {"Changes": added}
    assert client("Changes", ID="two") == {"Changes": [*added, {"Path": "/a", "Kind": 1}]}


def test_an_error_amid_a_diff_does_not_look_like_a_tar(daemon, client):
    """A name that a tar of changes cannot hold, behind more than was buffered."""
    make(client, "one", {"a": os.urandom(4 * MIB), "z/.wh.name": b""})
    connection, reply = client.begin_diff("one")
    with contextlib.closing(connection), pytest.raises(http.client.IncompleteRead):
        reply.read()
    wait_for(lambda: mounted_layers(daemon.home) == set())
    assert "a layer cannot hold names that start with '.wh.'" in daemon.log.read_text()
    make(client, "two", {"z/.wh.name": b""})
    answer = client.send("/GraphDriver.Diff", b'{"ID": "two"}')
    assert answer.status == 500
    assert "a layer cannot hold names that start with '.wh.'" in answer.error


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tar: tar[:2560], "the archive has no end"),
        (lambda tar: tar[:700], "ends within"),
        (lambda tar: tar[:512] + tar[1024:], "its checksum is wrong"),
        (lambda tar: tar[:100] + b"\xff" + tar[101:], "its checksum is wrong"),
        (lambda tar: os.urandom(4096), "its checksum is wrong"),
        (lambda tar: b"\x1f\x8b\x08" + bytes(100), ""),
        (lambda tar: tar_of({"../../../up": b"1"}), "leads out of the layer"),
    ],
)  # fmt: skip
def test_tars_that_are_damaged(daemon, client, spoil, reason):
    client("Create", ID="one")
    tar = spoil(tar_of({"a": b"x" * 600, "b": b"1"}))
    reply = client.apply("one", iter([tar]))
    assert reply.status == 200
    assert reason in reply.error
    assert mounted_layers(daemon.home) == set()
    # Half of it may be there: Docker removes the layer, and must not go on with it
    assert "holds a part of another transfer" in client.apply("one", tar_of({})).error
    client("Remove", ID="one")
    client("Create", ID="one")
    assert client.apply("one", tar_of({"a": b"12"})).json == {"Size": 2}


def test_a_client_that_leaves_amid_its_tar(daemon, client):
    client("Create", ID="one")
    for headers, rest in (
        ({"Transfer-Encoding": "chunked"}, b"100000\r\n"),
        ({"Content-Length": str(64 * MIB)}, b""),
    ):
        connection = UnixConnection(daemon.docker)
        connection.putrequest("POST", "/GraphDriver.ApplyDiff?id=one&parent=")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        body = b"".join(long_tar(1))
        connection.send(rest + body[: 600 * 1024])
        wait_for(lambda: mounted_layers(daemon.home) == {"one"})
        connection.close()
        wait_for(lambda: mounted_layers(daemon.home) == set())
        assert "holds a part of another transfer" in client.apply("one", b"").error
        client("Remove", ID="one")
        client("Create", ID="one")
    assert client.apply("one", tar_of({"a": b"12"})).json == {"Size": 2}


def test_half_of_a_tar_is_not_taken_for_the_whole_after_a_kill(daemon, client):
    """Docker's client sends what it has not sent yet of a tar again, be it nothing."""
    client("Create", ID="one")

    def broken() -> Iterator[bytes]:
        for number, piece in enumerate(long_tar(8)):
            yield piece
            if number == 4:
                wait_for(lambda: mounted_layers(daemon.home) == {"one"})
                daemon.kill()

    with pytest.raises(OSError, match=r"."):
        client.apply("one", broken())
    daemon.start()
    assert mounted_layers(daemon.home) == set()  # nobody uses it any more
    assert "holds a part of another transfer" in client.apply("one", b"").error
    client("Remove", ID="one")
    client("Create", ID="one")
    assert client.apply("one", tar_of({"a": b"12"})).json == {"Size": 2}


def test_a_full_pool(tmp_path):
    """A tar waits for room as any writer does; the other calls do not wait behind it."""
    options = (
        *("dm.loopdatasize=96M", "dm.loopmetadatasize=16M", "dm.basesize=256M"),
        "dm.min_free_space=5%",
    )
    with served(tmp_path, storage_options=options, docker=True, check_log=False) as daemon:
        client = PluginClient(daemon.docker)
        client("Create", ID="ballast")
        client("Create", ID="one")
        assert client.apply("ballast", long_tar(50)).json == {"Size": 50 * MIB}
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(client.apply, "one", long_tar(60))
            wait_for(lambda: is_full(client))
            assert "pool is out of data space" in client.error("Create", ID="two")
            assert client("Exists", ID="two") == {"Exists": False}
            assert not waiting.done()
            client("Remove", ID="ballast")
            assert waiting.result(60).json == {"Size": 60 * MIB}
        client("Create", ID="two")
        assert client.apply("two", tar_of({"a": b"12"})).json == {"Size": 2}
        assert members(client.diff("two")) == {"a": b"12"}


def is_full(client: PluginClient) -> bool:
    rows = dict(client("Status")["Status"])
    return bool(rows["Data Space Available"] == "0 B")


def test_who_it_belongs_to_is_listed(daemon, client):
    make(client, "one", {})
    record = json.loads((daemon.home / "metadata/one").read_text())
    assert record["owner"] == "docker"
