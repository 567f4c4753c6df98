"""Docker's layers, containerd's snapshots and the command line's layers in one pool."""

import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import pytest

from devmapper.linux import mount as mounts
from tests.support.daemon import Daemon, served
from tests.support.graphs import records
from tests.support.layers_client import PluginClient, PluginError
from tests.support.snapshots_client import SnapshotsClient
from tests.support.soak_containerd import mount

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

OPTIONS = ("dm.loopdatasize=1G", "dm.loopmetadatasize=16M", "dm.basesize=64M")
ROUNDS = 4
SECONDS = 120.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with served(tmp_path, storage_options=OPTIONS, docker=True, containerd=True) as daemon:
        yield daemon


def snapshot_layers(daemon: Daemon) -> dict[str, str]:
    """The layer of each snapshot by the snapshot's name."""
    found = {}
    for layer, record in records(daemon.home).items():
        snapshot = record.get("snapshot")
        if isinstance(snapshot, dict):
            found[str(snapshot["key"])] = layer
    return found


def work_as_docker(client: PluginClient, number: int) -> None:
    layer, child = f"docker-{number}", f"docker-{number}-child"
    client.create(layer)
    root = client.get(layer)
    (root / "file").write_text(layer)
    client.put(layer)
    client.create(child, layer)
    root = client.get(child)
    assert (root / "file").read_text() == layer
    client.put(child)
    client.remove(child)


def work_as_containerd(client: SnapshotsClient, number: int, place: Path) -> None:
    name = f"containerd-{number}"
    place.mkdir(exist_ok=True)
    mount(client.prepare(f"{name}-key"), place)
    (place / "file").write_text(name)
    mounts.unmount(place)
    client.commit(name, f"{name}-key")
    mount(client.view(f"{name}-view", name), place)
    assert (place / "file").read_text() == name
    mounts.unmount(place)
    client.remove(f"{name}-view")


def work_as_command(daemon: Daemon, number: int) -> None:
    layer = f"command-{number}"
    daemon.command("create", layer)
    root = Path(daemon.command("get", layer).text.rstrip("\n"))
    (root / "file").write_text(layer)
    daemon.command("put", layer)
    daemon.command("create", f"{layer}-child", "--parent", layer)
    daemon.command("rm", f"{layer}-child")


def test_all_three_work_at_once(daemon, docker, containerd, tmp_path):
    place = tmp_path / "place"
    works: list[Callable[[int], None]] = [
        lambda number: work_as_docker(docker, number),
        lambda number: work_as_containerd(containerd, number, place),
        lambda number: work_as_command(daemon, number),
    ]
    at_once = threading.Barrier(len(works))

    def go_on(work: Callable[[int], None]) -> str:
        try:
            for number in range(ROUNDS):
                at_once.wait(SECONDS)
                work(number)
        except BaseException:
            at_once.abort()
            return traceback.format_exc()
        return ""

    with ThreadPoolExecutor(len(works)) as pool:
        failed = [text for text in pool.map(go_on, works) if text]
    assert not failed, "\n".join(failed)

    snapshots = snapshot_layers(daemon)
    assert set(snapshots) == {"", *(f"containerd-{n}" for n in range(ROUNDS))}
    listed = {row["id"]: row for row in daemon.command("--json", "ls").json}
    owners = {layer: row["owner"] for layer, row in listed.items()}
    assert owners == {
        "base": None,
        **dict.fromkeys(snapshots.values(), "containerd"),
        **{f"docker-{n}": "docker" for n in range(ROUNDS)},
        **{f"command-{n}": None for n in range(ROUNDS)},
    }
    for name, layer in snapshots.items():
        assert listed[layer]["snapshot"]["key"] == name
    assert containerd.names() == [f"containerd-{n}" for n in range(ROUNDS)]
    for n in range(ROUNDS):
        assert docker.exists(f"docker-{n}")
        assert docker.exists(f"command-{n}")
        docker.remove(f"docker-{n}")
        containerd.remove(f"containerd-{n}")
        daemon.command("rm", f"command-{n}")
    assert records(daemon.home).keys() == {"base", "snapshot-root"}


def test_containerds_snapshots_do_not_exist_for_docker(daemon, docker, containerd):
    containerd.prepare("key")
    containerd.commit("name", "key")
    layer = snapshot_layers(daemon)["name"]
    for other in (layer, "snapshot-root"):
        assert not docker.exists(other)
        docker.remove(other)  # what is not there is removed already
        calls: tuple[Callable[[], object], ...] = (
            partial(docker.get, other),
            partial(docker.put, other),
            partial(docker.create, "child", other),
            partial(docker.changes, other, ""),
            partial(docker.apply_diff, other, "", b""),
        )
        for call in calls:
            with pytest.raises(PluginError, match="does not exist"):
                call()
        with pytest.raises(PluginError, match="already exists"):
            docker.create(other)
    assert snapshot_layers(daemon)["name"] == layer
    assert containerd.names() == ["name"]
    containerd.remove("name")


def test_dockers_layers_do_not_exist_for_containerd(daemon, docker, containerd):
    docker.create("layer")
    assert containerd.names() == []
    calls: tuple[Callable[[], object], ...] = (
        lambda: containerd.stat("layer"),
        lambda: containerd.mounts("layer"),
        lambda: containerd.remove("layer"),
        lambda: containerd.prepare("key", "layer"),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    containerd.prepare("layer")  # names are each client's own
    containerd.remove("layer")
    assert docker.exists("layer")
    docker.remove("layer")


def test_what_docker_has_mounted_the_command_line_does_not_take_away(daemon, docker):
    docker.create("layer")
    root = docker.get("layer")
    (root / "file").write_text("docker's")
    assert "docker" in daemon.command.fails(12, "put", "layer")
    assert Path(daemon.command("get", "layer").text.rstrip("\n")) == root
    docker.put("layer")
    assert (root / "file").read_text() == "docker's"
    daemon.command("put", "layer")
    assert not root.exists()
    docker.remove("layer")
