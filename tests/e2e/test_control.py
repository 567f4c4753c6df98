"""Commands beside a real daemon that serves Docker and containerd as well."""

import io
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from devmapper.graph.remote import RemoteGraph
from tests.support.daemon import Daemon, served
from tests.support.snapshots_client import connected
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

ACTIVE_SECONDS = 30.0


def make_three(daemon: Daemon) -> str:
    """One layer for each owner; returns the id of containerd's."""
    import http.client
    import socket

    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(daemon.docker))
    body = '{"ID": "image", "Parent": ""}'
    connection.request("POST", "/GraphDriver.Create", body, {"Accept": "*/*"})
    try:
        assert connection.getresponse().read() == b"{}"
    finally:
        connection.close()
    with connected(daemon.containerd) as client:
        client.prepare("k8s.io/1/web", "")
    daemon.command("create", "mine")
    (layer,) = [
        each["id"]
        for each in daemon.command("--json", "ls").json
        if each["snapshot"] and each["snapshot"]["key"]
    ]
    return str(layer)


def test_layers_of_all_front_ends_in_one_list(tmp_path):
    with served(tmp_path, docker=True, containerd=True) as daemon:
        dm = daemon.command
        layer = make_three(daemon)
        listed = {each["id"]: each for each in dm("--json", "ls").json}
        assert {name: each["owner"] for name, each in listed.items()} == {
            "base": None, "image": "docker", "mine": None,
            layer: "containerd", "snapshot-root": "containerd",
        }  # fmt: skip
        assert listed[layer]["snapshot"]["kind"] == "active"
        assert "containerd: active snapshot 'k8s.io/1/web'" in dm("ls").text
        assert " Owner: docker" in dm("inspect", "image").text
        for foreign, owner in (("image", "docker"), (layer, "containerd")):
            assert f"layer {foreign!r} belongs to {owner}" in dm.fails(2, "rm", foreign)
        assert "belongs to containerd" in dm.fails(2, "get", layer)
        dm("rm", "--force", "image", layer)
        with connected(daemon.containerd) as client:
            assert client.names() == []
        daemon.stop()
        # The same without a daemon
        assert [each["id"] for each in dm("--json", "ls").json] == ["base", "mine", "snapshot-root"]
        daemon.start()


def test_a_directory_is_imported_for_the_daemons_containers(tmp_path):
    """The command copies by itself and is not told the maps; without a daemon it has its own."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").touch()
    os.chown(tree / "file", 7, 8)
    maps = "0:100000:65536"
    with served(tmp_path, id_map=maps) as daemon:
        dm = daemon.command
        dm("import", "a", tree)
        daemon.stop()
        dm("--id-map", maps, "import", "b", tree)
        for layer, words in (("a", []), ("b", ["--id-map", maps])):
            file = Path(dm(*words, "get", layer).text.strip()) / "file"
            assert (file.stat().st_uid, file.stat().st_gid) == (100007, 100008)
            dm("put", layer)
            with tarfile.open(fileobj=io.BytesIO(dm("--id-map", maps, "diff", layer).out)) as tar:
                assert [(each.name, each.uid, each.gid) for each in tar] == [("file", 7, 8)]
        os.chown(tree / "file", 100007, 8)
        daemon.start()
        message = dm.fails(13, "import", "c", tree)
        assert "tar entry 'file': user id 100007 is in none of the maps" in message
        assert not [each for each in dm("--json", "ls").json if each["id"] == "c"]


def test_what_nobody_does_behind_the_daemons_back(tmp_path):
    with served(tmp_path) as daemon:
        for words in (
            ["engine", "stop"],
            ["engine", "stop", "--force"],
            ["pool", "check", "--clear-needs-check"],
            ["pool", "create", "--device", "/dev/null"],
        ):
            assert f"is in use by process {daemon.pid} " in daemon.command.fails(4, *words)
        assert daemon.command("pool", "check").text.endswith(": no damage\n")
        assert daemon.command("pool", "dump").text.endswith("</superblock>\n")


def test_a_daemon_that_is_stopped_or_killed(tmp_path):
    with served(tmp_path) as daemon:
        dm = daemon.command
        dm("create", "a")
        path = Path(dm("get", "a").text.strip())
        daemon.signal(signal.SIGSTOP)
        try:
            ended = dm.run("exists", "a")
            assert ended.status == 4
            assert f"process {daemon.pid} " in ended.message
        finally:
            daemon.signal(signal.SIGCONT)
        daemon.kill()
        assert dm("get", "a").text.strip() == str(path)  # by the command itself
        daemon.start()
        assert dm("get", "a").text.strip() == str(path)
        dm("put", "a")
        assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_ends_amid_an_apply(tmp_path, number):
    with served(tmp_path) as daemon:
        dm = daemon.command
        dm("create", "a")
        process = dm.start("apply", "a", stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            info = tarfile.TarInfo("big")
            info.size = 4 << 20
            archive.addfile(info, io.BytesIO(os.urandom(4 << 20)))
        assert process.stdin is not None
        process.stdin.write(raw.getvalue()[: 3 << 20])
        process.stdin.flush()
        graph = RemoteGraph(daemon.control)
        await_devices(graph, 1)
        process.send_signal(number)
        process.communicate(timeout=60)
        if number == signal.SIGTERM:
            assert process.returncode == 128 + number
            assert graph.engine().devices == ()  # it has waited for the daemon to let go
        await_devices(graph, 0)
        dm("rm", "a")


def test_a_reader_that_has_enough_of_a_diff(tmp_path):
    with served(tmp_path) as daemon:
        dm = daemon.command
        dm("create", "a")
        (Path(dm("get", "a").text.strip()) / "big").write_bytes(os.urandom(16 << 20))
        dm("put", "a")
        process = dm.start("diff", "a", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.read(1000)
        process.stdout.close()
        process.stdout = None
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 141
        await_devices(RemoteGraph(daemon.control), 0)


def await_devices(graph: RemoteGraph, count: int) -> None:
    wait_for(lambda: len(graph.engine().devices) == count)


def test_a_command_at_the_daemon_starts_quickly(tmp_path):
    """Neither the daemon's modules nor those that open a graph are loaded."""
    import sys

    with served(tmp_path) as daemon:
        words = [sys.executable, "-X", "importtime", *daemon.command.argv("exists", "a")[1:]]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "devmapper.graph.remote" in loaded
        heavy = {"aiohttp", "asyncio", "grpc", "prometheus_client", "devmapper.driver", "tarfile"}
        assert loaded & heavy == set()
