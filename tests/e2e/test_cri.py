"""Pods on our snapshots, as a kubelet starts and watches them: CRI of Debian's containerd 1.6.

Pods use the node's network; no plugin for another one is needed then.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from devmapper.units import MIB
from tests.support import containerd as rig
from tests.support import cri, snapshots_client
from tests.support.containerd import SNAPSHOTTER, Containerd
from tests.support.cri import Cri
from tests.support.daemon import Daemon, served
from tests.support.dockerd import busybox_tar
from tests.support.waiting import wait_for

OPTIONS: Final = (
    "dm.loopdatasize=1G",
    "dm.loopmetadatasize=16M",
    "dm.basesize=128M",
    "dm.override_udev_sync_check=true",
)
PAUSE: Final = "docker.io/dmt/pause"
IMAGE: Final = "docker.io/dmt/web"
IMAGES_FOLDER: Final = f"io.containerd.snapshotter.v1.{SNAPSHOTTER}"
TAG: Final = ":latest"

pytestmark = [
    pytest.mark.root,
    pytest.mark.docker,
    pytest.mark.tools,
    pytest.mark.e2e,
    pytest.mark.timeout(300),
]


class Node(NamedTuple):
    daemon: Daemon
    containerd: Containerd
    cri: Cri
    config: Path  # the daemon's, as a user would have it


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.fuse),
        # A minute in the guest, whose engine test_containerd.py has seen already
        pytest.param("kernel", marks=[pytest.mark.kernel, pytest.mark.soak]),
    ]
)
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
    """Our daemon and a containerd that has been told of it what our command prints."""
    with (
        served(tmp_path, storage_options=OPTIONS, engine=request.param, containerd=True) as daemon,
        rig.containerd(tmp_path, daemon.containerd) as containerd,
    ):
        config = tmp_path / "config.toml"
        config.write_text(
            f"root = {json.dumps(str(daemon.home))}\n"
            f"[containerd]\nsocket = {json.dumps(str(daemon.containerd))}\n"
        )
        printed = daemon.command.run("config", "containerd", "--config", str(config))
        assert printed.status == 0, printed.err
        # A kubelet would have no file system of images without this
        assert f"ln -s {daemon.home} /var/lib/containerd/{IMAGES_FOLDER}" in printed.err
        cri.configure(containerd, printed.text, f"{PAUSE}{TAG}")
        containerd.start()
        with cri.connected(containerd) as client:
            yield Node(daemon, containerd, client, config)
        containerd.stop()


@pytest.fixture
def images(node: Node, tmp_path: Path) -> None:
    """One for pods and one for a container, with layers of their own, in CRI's list."""
    for name, layers, command in (
        (PAUSE, [busybox_tar()], ["sleep", "100000"]),
        (IMAGE, [busybox_tar({"etc/settings": b"web\n"})], ["sh"]),
    ):
        rig.write_oci_archive(tmp_path / "image.tar", layers, command=command)
        node.containerd.import_image(tmp_path / "image.tar", name)
    # CRI is told of images by events
    wanted = {f"{name}{TAG}" for name in (PAUSE, IMAGE)}
    wait_for(lambda: node.cri.images() == wanted, lambda: f"CRI's images: {node.cri.images()}")


def in_use(daemon: Daemon) -> int:
    """Bytes of all our snapshots."""
    with snapshots_client.connected(daemon.containerd) as client:
        return sum(client.usage(name)[0] for name in client.names())


def sees_all(node: Node) -> bool:
    """Whether CRI has the bytes that we tell; it asks once in a second."""
    return node.cri.image_file_system()[1] == in_use(node.daemon)


def is_found(containerd: Containerd) -> bool:
    """Whether containerd has found us again, which takes three seconds at most."""
    return containerd.tried("snapshots", "--snapshotter", SNAPSHOTTER, "ls")[0] == 0


def told(node: Node) -> str:
    return f"told by CRI: {node.cri.image_file_system()}, in use: {in_use(node.daemon)}"


def write(node: Node, container: str, name: str, mebibytes: int) -> None:
    node.cri.exec(
        container, "dd", "if=/dev/urandom", f"of=/{name}", "bs=1M", f"count={mebibytes}",
        "conv=fsync",
    )  # fmt: skip


def test_what_our_command_prints_lets_pods_use_our_snapshots(node):
    found = node.cri.config()
    assert found["containerd"]["snapshotter"] == SNAPSHOTTER
    assert found["sandboxImage"] == f"{PAUSE}{TAG}"
    assert node.cri.conditions()["RuntimeReady"]
    done = node.daemon.command.run(
        "config", "kubernetes", "--check",
        "--config", str(node.config), "--file", str(node.containerd.config),
    )  # fmt: skip
    assert done.status == 0, (done.text, done.err)


def test_a_pod_s_life(node, images):
    daemon, containerd, client, _ = node
    mine = set(containerd.snapshots())
    pod = client.run_pod("web")
    first = client.run_container(pod, "first", f"{IMAGE}{TAG}", "sleep", "100000")
    assert client.exec(first, "cat", "/etc/settings") == "web"
    client.exec(first, "sh", "-c", "echo one >/one")
    assert client.exec(first, "cat", "/one") == "one"
    kinds = {key: kind for key, (_, kind) in containerd.snapshots().items()}
    assert {key for key in kinds if key not in mine} == {pod, first}
    assert kinds[pod] == kinds[first] == "Active"

    # What a kubelet evicts by: the container's bytes, and those of the file system of images
    wait_for(lambda: sees_all(node), lambda: told(node))
    place, before, inodes = client.image_file_system()
    assert place == containerd.root / IMAGES_FOLDER
    written = client.written(first)
    assert 0 < written < 8 * MIB
    write(node, first, "big", 16)
    client.exec(first, "sh", "-c", "i=0; while [ $i -lt 100 ]; do echo >/tmp/$i; i=$((i+1)); done")
    wait_for(lambda: client.written(first) >= written + 16 * MIB, lambda: told(node))
    wait_for(lambda: client.image_file_system()[2] >= inodes + 101, lambda: told(node))
    assert client.written(first) < written + 24 * MIB
    wait_for(lambda: sees_all(node), lambda: told(node))
    after = client.image_file_system()[1]
    assert before + 16 * MIB <= after

    # Our daemon is killed: the pod goes on, and its next container starts when we are back
    daemon.kill()
    write(node, first, "more", 4)
    daemon.start()
    wait_for(lambda: client.written(first) >= written + 20 * MIB, lambda: told(node))
    second = client.run_container(pod, "second", f"{IMAGE}{TAG}", "sleep", "100000")
    assert client.exec(second, "cat", "/etc/settings") == "web"
    assert client.exec(first, "cat", "/one") == "one"
    client.call("StopContainer", container_id=first)
    client.call("RemoveContainer", container_id=first)
    assert set(containerd.snapshots()) == mine | {pod, second}
    wait_for(lambda: client.image_file_system()[1] < after, lambda: told(node))

    # A pod ends without us, too: containerd forgets its snapshots, and collects ours with the next
    daemon.kill()
    client.end(pod)
    daemon.start()
    wait_for(lambda: is_found(containerd), containerd.tail)
    assert set(containerd.snapshots()) == mine
    for name in (IMAGE, PAUSE):
        client.remove_image(f"{name}{TAG}")
    assert client.images() == set()
    assert containerd.snapshots() == {}
    with snapshots_client.connected(daemon.containerd) as snapshots:
        wait_for(lambda: not snapshots.names(), lambda: f"left: {snapshots.names()}")
    wait_for(lambda: client.image_file_system()[1:] == (0, 0), lambda: told(node))
    left = {entry["id"] for entry in daemon.command.run("--json", "ls").json}
    assert left == {"base", "snapshot-root"}
