"""A daemon under hostile load: a thousand requests at once, clients that leave, a full pool."""

import http.client
import io
import json
import os
import socket
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest

from devmapper.linux import mount as mounts
from devmapper.server.containerd.api import mount_pb2
from devmapper.server.containerd.api import snapshots_pb2 as api
from devmapper.server.streams import PIECE
from devmapper.units import MIB
from tests.support.daemon import Daemon, served
from tests.support.graphs import records
from tests.support.layers_client import PluginClient, PluginError
from tests.support.snapshots_client import SERVICE, SnapshotsClient, connected
from tests.support.soak_containerd import mount
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

OPTIONS = ("dm.loopdatasize=1G", "dm.loopmetadatasize=16M", "dm.basesize=64M")
LAYERS = 20
Call: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"
SECONDS = 120.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    options = {"docker": True, "containerd": True, "check_log": False}
    with served(tmp_path, storage_options=OPTIONS, **options) as daemon:  # type: ignore[arg-type]
        yield daemon
        daemon.stop()
        log = daemon.log.read_text()
        assert "Traceback" not in log
        assert " ERROR " not in log


@pytest.fixture
def docker(daemon: Daemon) -> Iterator[PluginClient]:
    client = PluginClient(daemon.docker)
    yield client
    client.close()


@pytest.fixture
def containerd(daemon: Daemon) -> Iterator[SnapshotsClient]:
    with connected(daemon.containerd) as client:
        yield client


def mounted_below(place: Path) -> list[str]:
    points = [str(entry.mount_point) for entry in mounts.mountinfo()]
    return [point for point in points if point.startswith(f"{place}/")]


def only_root(daemon: Daemon) -> bool:
    return records(daemon.home).keys() <= {"base", "snapshot-root"}


def request(endpoint: str, body: str) -> bytes:
    head = f"POST /{endpoint} HTTP/1.1\r\nHost: d\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def connect(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.settimeout(SECONDS)
    found.connect(str(path))
    return found


def answer(connection: socket.socket) -> bytes:
    with connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == http.client.OK
        return response.read()


def test_a_thousand_requests_at_once(daemon, docker, containerd):
    """All are under way before an answer is read, and each gets its own."""
    docker.create("parent")
    containerd.prepare("key")
    containerd.commit("parent", "key")
    requests = [
        request("GraphDriver.Create", f'{{"ID":"d{n}","Parent":"parent"}}')
        if n < LAYERS
        else request(f"GraphDriver.{('Exists', 'GetMetadata')[n % 2]}", '{"ID":"parent"}')
        for n in range(500)
    ]
    connections = [connect(daemon.docker) for _ in requests]
    call = containerd.channel.unary_unary
    prepare = call(f"/{SERVICE}/Prepare")
    stat = call(f"/{SERVICE}/Stat")
    for connection, one in zip(connections, requests, strict=True):
        connection.sendall(one)
    futures = [
        prepare.future(
            api.PrepareSnapshotRequest(key=f"c{n}", parent="parent").SerializeToString(),
            timeout=SECONDS,
        )
        if n < LAYERS
        else stat.future(api.StatSnapshotRequest(key="parent").SerializeToString(), timeout=SECONDS)
        for n in range(500)
    ]
    answers = [answer(connection) for connection in connections]
    assert [found for found in answers if json.loads(found).get("Err")] == []
    assert all(future.result() is not None for future in futures)
    assert set(containerd.names()) == {"parent", *(f"c{n}" for n in range(LAYERS))}
    assert {f"d{n}" for n in range(LAYERS)} <= records(daemon.home).keys()
    for n in range(LAYERS):
        docker.remove(f"d{n}")
        containerd.remove(f"c{n}")
    docker.remove("parent")
    containerd.remove("parent")
    assert only_root(daemon)


def test_clients_that_leave_amid_a_tar(daemon, docker):
    """Nothing stays mounted; a layer that got a part of a tar can only be removed."""
    docker.create("large")
    root = docker.get("large")
    (root / "file").write_bytes(os.urandom(8 * MIB))
    docker.put("large")
    for _ in range(10):
        with docker.diff("large", "") as stream:
            assert stream.read(1000)
    tar = tar_of(4 * MIB)
    lengths = (0, 100, 100_000, 2 * MIB, len(tar) - 2000)
    for n, length in enumerate(lengths):
        docker.create(f"part{n}")
        path = f"GraphDriver.ApplyDiff?id=part{n}"
        head = f"POST /{path} HTTP/1.1\r\nHost: d\r\nContent-Length: {len(tar)}\r\n\r\n"
        with connect(daemon.docker) as connection:
            connection.sendall(head.encode() + tar[:length])
    wait_for(lambda: mounted_below(daemon.home / "mnt") == [])
    for n, length in enumerate(lengths):
        if length < PIECE:  # nothing was begun
            assert docker.apply_diff(f"part{n}", "", tar) == 4 * MIB
        else:
            with pytest.raises(PluginError, match="part of another transfer"):
                docker.apply_diff(f"part{n}", "", tar)
        docker.remove(f"part{n}")
    docker.create("whole")
    assert docker.apply_diff("whole", "", tar) == 4 * MIB
    with docker.diff("large", "") as stream, tarfile.open(fileobj=stream, mode="r|") as found:
        assert [member.size for member in found if member.isreg()] == [8 * MIB]
    for layer in ("large", "whole"):
        docker.remove(layer)
    assert only_root(daemon)


def test_clients_that_leave_amid_a_call(daemon, containerd):
    """A snapshot is there as a whole or not at all, and can be removed."""
    keys = [f"k{n}" for n in range(60)]
    with grpc.insecure_channel(f"unix:{daemon.containerd}") as channel:
        prepare: Call = channel.unary_unary(f"/{SERVICE}/Prepare")
        for key in keys:
            prepare.future(api.PrepareSnapshotRequest(key=key).SerializeToString())
        time.sleep(0.3)
    quiet = [-1]

    def settled() -> bool:
        quiet.append(len(containerd.names()))
        time.sleep(0.5)
        return quiet[-1] == quiet[-2]

    wait_for(settled)
    there = containerd.names()
    assert set(there) <= set(keys)
    for key in there:
        assert len(containerd.mounts(key)) == 1
        containerd.remove(key)
    assert only_root(daemon)


FULL = ("dm.loopdatasize=96M", "dm.loopmetadatasize=8M", "dm.basesize=32M")


def test_a_pool_that_gets_full_under_load(tmp_path):
    """New layers are refused before writes have to wait."""
    told = fill(tmp_path, (*FULL, "dm.min_free_space=50%"), rounds=2)
    assert all("dm.min_free_space" in text for text in told), told


@pytest.mark.soak  # writes to a full pool wait for a minute
def test_a_pool_that_is_full_under_load(tmp_path):
    told = fill(tmp_path, (*FULL, "dm.min_free_space=0%"), rounds=1)
    assert all("No space left" in text or "Input/output" in text for text in told), told


def fill(tmp_path: Path, options: tuple[str, ...], *, rounds: int) -> list[str]:
    """Each client gets one clear error; what was acknowledged is there, nothing else, and goes."""
    places = [tmp_path / f"place-{n}" for n in range(4)]
    told: list[str] = []
    with served(
        tmp_path, storage_options=options, docker=True, containerd=True, check_log=False
    ) as daemon:
        works = [partial(fill_as_docker, daemon, f"d{n}") for n in range(4)]
        works += [partial(fill_as_containerd, daemon, f"c{n}", at) for n, at in enumerate(places)]
        for _ in range(rounds):
            with ThreadPoolExecutor(len(works)) as pool:
                futures = [pool.submit(work) for work in works]
            told += [future.result() for future in futures]
            remove_all(daemon)
        assert "Traceback" not in daemon.log.read_text()
    print(*told, sep="\n")
    return told


def remove_all(daemon: Daemon) -> None:
    found = records(daemon.home)
    with connected(daemon.containerd) as containerd:
        names = containerd.names()
        assert not [name for name in names if name.endswith("-key")]
        owned = [one for one in found.values() if one.get("owner") == "containerd"]
        assert len(owned) <= len(names) + 1
        for name in names:
            containerd.remove(name)
    docker = PluginClient(daemon.docker)
    for name, record in found.items():
        if record.get("owner") == "docker":
            docker.remove(name)
    docker.close()
    assert only_root(daemon)


def fill_as_docker(daemon: Daemon, name: str) -> str:
    """Make layers until that is refused; returns the words."""
    client = PluginClient(daemon.docker)
    tar = tar_of(3 * MIB)
    layers: list[str] = []

    def make_many() -> None:
        for n in range(100):
            layers.append(f"{name}-{n}")
            client.create(layers[-1])
            client.apply_diff(layers[-1], "", tar)

    with closing(client):
        with pytest.raises(PluginError) as caught:
            make_many()
        client.remove(layers[-1])
    assert caught.value.status == http.client.OK
    return one_sentence(str(caught.value))


def fill_as_containerd(daemon: Daemon, name: str, place: Path) -> str:
    """As `fill_as_docker`; what is written to a mount fails there."""
    place.mkdir(exist_ok=True)
    keys: list[str] = []

    def make_many(client: SnapshotsClient) -> None:
        for n in range(100):
            keys.append(f"{name}-{n}-key")
            fill_one(client.prepare(keys[-1]), place)
            client.commit(f"{name}-{n}", keys[-1])

    with connected(daemon.containerd) as client:
        with pytest.raises((grpc.RpcError, OSError)) as caught:
            make_many(client)
        error = caught.value
        if not isinstance(error, grpc.RpcError):
            client.remove(keys[-1])
            return str(error)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
    return one_sentence(error.details() or "")


def fill_one(found: list[mount_pb2.Mount], place: Path) -> None:
    mount(found, place)
    try:
        write(place / "file")
    finally:
        mounts.unmount(place)


def write(file: Path) -> None:
    with file.open("wb") as out:
        out.write(os.urandom(3 * MIB))
        out.flush()
        os.fsync(out.fileno())


def one_sentence(text: str) -> str:
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def tar_of(length: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = length
        tar.addfile(member, io.BytesIO(os.urandom(length)))
    return out.getvalue()
