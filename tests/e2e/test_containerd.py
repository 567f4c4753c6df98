"""Debian's containerd 1.6 and runc on `devmapper serve`, on both engines: images, containers, ends.

Both daemons take seconds to start, so that each test is one long story.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from devmapper.linux import mount
from tests.support import containerd as rig
from tests.support import snapshots_client
from tests.support.containerd import NAMESPACE, SNAPSHOTTER, Containerd
from tests.support.daemon import Daemon, served
from tests.support.dockerd import busybox_tar
from tests.support.waiting import wait_for

OPTIONS = (
    "dm.loopdatasize=1G",
    "dm.loopmetadatasize=16M",
    "dm.basesize=128M",
    "dm.override_udev_sync_check=true",
)
IMAGE = "dmt/busybox"
COUNT = "i=0; while true; do i=$((i+1)); echo $i >/count; busybox sync; sleep 0.1; done"

pytestmark = [
    pytest.mark.root,
    pytest.mark.docker,
    pytest.mark.tools,
    pytest.mark.e2e,
    pytest.mark.timeout(300),
]


class Both(NamedTuple):
    daemon: Daemon
    containerd: Containerd


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.fuse),
        pytest.param("kernel", marks=pytest.mark.kernel),
    ]
)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Both]:
    """Both run; at the end nothing of them is left, and thin_check has the last word."""
    with (
        served(tmp_path, storage_options=OPTIONS, engine=request.param, containerd=True) as daemon,
        rig.containerd(tmp_path, daemon.containerd) as containerd,
    ):
        containerd.start()
        yield Both(daemon, containerd)
        if containerd.running:
            containerd.stop()


def layer(*members: tuple[str, bytes] | str) -> bytes:
    """A tar of files, and of directories whose names end with a slash."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for member in members:
            name, content = (member, b"") if isinstance(member, str) else member
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.mode = 0o755 if name.endswith("/") else 0o644
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


LAYERS = (
    busybox_tar({"etc/settings": b"short\n", "gone": b"soon\n", "one": b"1\n"}),
    layer("dir/", ("dir/a", b"a"), ("dir/b", b"b"), ("etc/settings", b"longer than before\n")),
    layer(".wh.gone", "dir/", "dir/.wh..wh..opq", ("dir/c", b"c")),
)


@pytest.fixture
def image(both: Both, tmp_path: Path) -> str:
    """An image of three layers, the last with whiteouts, imported and unpacked."""
    diff_ids = rig.write_oci_archive(tmp_path / "image.tar", LAYERS)
    both.containerd.import_image(tmp_path / "image.tar", IMAGE)
    chain = rig.chain_ids(diff_ids)
    assert both.containerd.snapshots() == {
        chain[0]: ("", "Committed"),
        chain[1]: (chain[0], "Committed"),
        chain[2]: (chain[1], "Committed"),
    }
    return f"{IMAGE}:latest"


def ours(both: Both) -> set[str]:
    """Our snapshots by the keys that containerd's clients gave them."""
    with snapshots_client.connected(both.daemon.containerd) as client:
        names = client.names()
    parts = [name.split("/", 2) for name in names]
    assert {namespace for namespace, _, _ in parts} <= {NAMESPACE}
    return {key for _, _, key in parts}


def assert_same_snapshots(both: Both) -> None:
    """Ours and those that containerd knows of are the same, once its garbage collector has run."""

    def are_same() -> bool:
        both.containerd.collect_garbage()
        return ours(both) == set(both.containerd.snapshots())

    wait_for(
        are_same, lambda: f"ours: {ours(both)}, containerd's: {set(both.containerd.snapshots())}"
    )


def assert_no_snapshots(both: Both) -> None:
    """Neither of us has any."""
    assert_same_snapshots(both)
    assert both.containerd.snapshots() == {}


def assert_consistent(both: Both) -> None:
    """Each thin device has its record and each record its device."""
    both.containerd.stop()
    both.daemon.stop()
    found = both.daemon.command.run("check")
    assert found.status == 0, found.err


def mounted_devices(both: Both) -> set[str]:
    """Sources of mounts whose device is one of ours."""
    with snapshots_client.connected(both.daemon.containerd) as client:
        sources = {
            entry.source
            for info in client.infos("kind!=committed")
            for entry in client.mounts(info.name)
        }
    return sources & {str(entry.source) for entry in mount.mountinfo()}


def test_a_life(both, image):
    containerd = both.containerd
    images = set(containerd.snapshots())
    assert containerd.run(image, "c1", "cat", "/etc/settings", "/dir/c", options=["--rm"]) == (
        "longer than before\nc"
    )
    listed = containerd.run(image, "c2", "ls", "/", "/dir", options=["--rm"])
    assert "gone" not in listed
    assert "lost+found" not in listed
    assert listed.split("/dir:")[1].split() == ["c"]

    # Containers write, each to its own snapshot
    for name in ("c3", "c4"):
        containerd.run(image, name, "sleep", "1000", options=["--detach"])
        containerd.exec(
            name, "sh", "-c", f"echo {name} >/one; dd if=/dev/zero of=/big bs=1M count=8 conv=fsync"
        )
    assert [containerd.exec(name, "cat", "/one") for name in ("c3", "c4")] == ["c3", "c4"]
    assert set(containerd.snapshots()) == images | {"c3", "c4"}
    assert containerd.snapshots()["c3"][1] == "Active"
    usage = containerd.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "usage", "-b", "c3").split()
    assert 8 << 20 <= int(usage[4]) < 32 << 20
    assert int(usage[5]) >= 1
    assert_same_snapshots(both)

    for name in ("c3", "c4"):
        containerd.end(name)
    assert_same_snapshots(both)
    assert set(containerd.snapshots()) == images

    # With the image its snapshots go, leaf first
    containerd.ctr("images", "rm", "--sync", image)
    assert containerd.snapshots() == {}
    assert_no_snapshots(both)
    assert mounted_devices(both) == set()
    assert_consistent(both)


def test_a_size_of_its_own(both, image):
    containerd = both.containerd

    def blocks(name: str, *options: str) -> int:
        said = containerd.run(image, name, "busybox", "df", "-k", "/", options=["--rm", *options])
        return int(said.splitlines()[-1].split()[-5])

    usual = blocks("c1")
    grown = blocks("c2", "--snapshotter-label", "containerd.io/snapshot/max-size=384MiB")
    assert usual < 128 << 10
    assert 300 << 10 < grown < 384 << 10
    status, _, words = containerd.tried(
        "run", "--snapshotter", SNAPSHOTTER, *containerd.where("c3"),
        "--snapshotter-label", "containerd.io/snapshot/max-size=many", image, "c3", "true",
    )  # fmt: skip
    assert status != 0
    assert "containerd.io/snapshot/max-size='many': expected a size" in words
    containerd.ctr("images", "rm", "--sync", image)
    assert_no_snapshots(both)


def test_containers_outlive_both_daemons(both, image):
    daemon, containerd = both

    def counts() -> bool:
        first = containerd.exec("c1", "cat", "/count")
        wait_for(lambda: containerd.exec("c1", "cat", "/count") != first, "it does not count")
        return True

    usage = ("snapshots", "--snapshotter", SNAPSHOTTER, "usage", "c1")
    containerd.run(image, "c1", "sh", "-c", COUNT, options=["--detach"])
    wait_for(lambda: containerd.exec("c1", "ls", "/").find("count") >= 0, "it does not begin")
    sources = mounted_devices(both)
    assert len(sources) == 1

    # Ours is killed: containers go on, requests fail, and the next daemon knows all
    daemon.kill()
    assert counts()
    status, _, words = containerd.tried(*usage)
    assert status != 0
    assert "unavailable" in words
    daemon.start()
    # containerd connects again by itself, after three seconds at most
    wait_for(lambda: containerd.tried(*usage)[0] == 0, "containerd does not find us again")
    assert counts()
    assert mounted_devices(both) == sources
    assert containerd.run(image, "c3", "cat", "/one", options=["--rm"]) == "1"

    # It is told to end, with the pool kept: the same
    daemon.restart()
    wait_for(lambda: containerd.tried(*usage)[0] == 0, "containerd does not find us again")
    assert counts()
    assert containerd.run(image, "c4", "cat", "/one", options=["--rm"]) == "1"

    # containerd is killed, and told to end
    containerd.kill()
    containerd.start()
    assert containerd.state_of("c1") == "RUNNING"
    assert counts()
    containerd.stop()
    containerd.start()
    assert counts()
    assert mounted_devices(both) == sources

    containerd.end("c1")
    containerd.ctr("images", "rm", "--sync", image)
    assert_no_snapshots(both)
    assert_consistent(both)


def test_what_is_left_is_collected(both, image):
    """Snapshots that containerd forgot of, and those that somebody needed when their image went."""
    daemon, containerd = both
    kept = set(containerd.snapshots())
    with snapshots_client.connected(daemon.containerd) as client:
        # What a containerd leaves that dies between our answer and its own commit
        client.prepare(f"{NAMESPACE}/999/orphan")
        client.commit(f"{NAMESPACE}/1000/orphan-base", f"{NAMESPACE}/999/orphan")
        client.view(f"{NAMESPACE}/1001/orphan-view", f"{NAMESPACE}/1000/orphan-base")
        assert len(client.names()) == len(kept) + 2
    containerd.run(image, "c1", "sleep", "1000", options=["--detach"])
    containerd.ctr("images", "rm", "--sync", image)
    assert set(containerd.snapshots()) == kept | {"c1"}
    assert containerd.exec("c1", "cat", "/one") == "1"
    containerd.end("c1")
    assert_no_snapshots(both)
    left = {entry["id"] for entry in daemon.command.run("--json", "ls").json}
    assert left == {"base", "snapshot-root"}
    assert_consistent(both)
