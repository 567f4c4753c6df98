"""Docker 28 with its images in containerd 2.1, and those on our snapshotter."""

import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from devmapper.linux import mount
from tests.conformance.dockerd_plugin_suite import CHANGES, DOCKERFILE, RUN, STOPPED_AT_ONCE
from tests.support import containerd as rig
from tests.support import dockerd, export_tree, snapshots_client
from tests.support.containerd import SNAPSHOTTER, Containerd
from tests.support.daemon import Daemon, served
from tests.support.debian import suite
from tests.support.docker_plugin import OPTIONS, prune
from tests.support.dockerd import Dockerd
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.docker,
    pytest.mark.tools,
    pytest.mark.newer,
    pytest.mark.timeout(300),
]


class All(NamedTuple):
    daemon: Daemon
    containerd: Containerd
    docker: Dockerd


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.fuse),
        pytest.param("kernel", marks=pytest.mark.kernel),
    ]
)
def rigs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[All]:
    """All three run; at the end Docker forgets what it has, and nothing is left of it."""
    programs = suite("sid")
    with (
        served(tmp_path, storage_options=OPTIONS, engine=request.param, containerd=True) as daemon,
        rig.containerd(tmp_path, daemon.containerd, programs) as containerd,
        dockerd.data_root(tmp_path, SNAPSHOTTER, programs, containerd.socket) as docker,
    ):
        containerd.start()
        docker.start()
        found = All(daemon, containerd, docker)
        yield found
        if docker.running:
            prune(docker)
            docker.docker("builder", "prune", "--all", "--force")
            wait_for(lambda: collected(found) == [], lambda: f"left: {names(daemon)}")
            assert mounted_devices(found) == set()
            docker.stop()
        containerd.stop()
        daemon.stop()
        checked = daemon.command.run("check")
        assert checked.status == 0, checked.err


def names(daemon: Daemon) -> list[str]:
    with snapshots_client.connected(daemon.containerd) as client:
        return sorted(client.names())


def collected(rigs: All) -> list[str]:
    """What is left once containerd's garbage collector has run.

    It asks for nothing without a removal since it asked last, even if our daemon was away then.
    """
    _try_scratch(rigs)
    rigs.containerd.collect_garbage()
    return names(rigs.daemon)


def mounted_devices(rigs: All) -> set[str]:
    """Sources of mounts whose device is one of ours."""
    with snapshots_client.connected(rigs.daemon.containerd) as client:
        sources = {
            entry.source
            for info in client.infos("kind!=committed")
            for entry in client.mounts(info.name)
        }
    return sources & {str(entry.source) for entry in mount.mountinfo()}


def await_connection(rigs: All) -> None:
    """containerd connects again by itself, after three seconds at most."""
    wait_for(lambda: _try_scratch(rigs), "containerd does not find us again")


def _try_scratch(rigs: All) -> bool:
    """Whether a snapshot can be made; it is removed again."""
    scratch = ("snapshots", "--snapshotter", SNAPSHOTTER)
    status, _, _ = rigs.containerd.tried(*scratch, "prepare", "scratch")
    rigs.containerd.tried(*scratch, "rm", "scratch")
    return status == 0


def import_first(docker: Dockerd) -> None:
    files = {"etc/settings": b"short", "gone": b"soon", "one": b"1"}
    docker.docker("import", "-", "first", stdin=dockerd.busybox_tar(files))


def exported(docker: Dockerd, name: str, folder: Path) -> dict[str, export_tree.Inode]:
    return export_tree.of_tar(docker.export(name, folder / f"{name}.tar"))


# docker cp into a container changes modes by fchmodat2(2), from Linux 6.6 on: the guest has 6.1
@pytest.mark.parametrize("rigs", [pytest.param("embedded", marks=pytest.mark.fuse)], indirect=True)
def test_images_and_containers(rigs, tmp_path):
    docker = rigs.docker
    info = docker.docker("info")
    assert f"Storage Driver: {SNAPSHOTTER}" in info
    assert "io.containerd.snapshotter.v1" in info
    import_first(docker)
    docker.docker(*RUN, "--name=c1", "first", "sh", "-c", CHANGES)
    changed = docker.docker("diff", "c1").splitlines()
    assert sorted(changed, key=lambda line: line[2:]) == [
        *("A /dir", "A /dir/hard", "A /dir/null", "A /dir/soft"),
        *("C /etc", "C /etc/settings", "D /gone", "A /two"),
    ]
    (tmp_path / "copied").write_text("docker cp\n")
    docker.docker("cp", str(tmp_path / "copied"), "c1:/copied")
    docker.docker("cp", "c1:/two", str(tmp_path / "two"))
    assert (tmp_path / "two").read_text() == "two\n"
    docker.docker("commit", "c1", "second")
    docker.docker(*RUN, "--name=c2", "second", "rm", "/two")
    tree = exported(docker, "c2", tmp_path)
    assert "two" not in tree
    assert "copied" in tree
    assert tree["dir/hard"].mode & 0o7777 == 0o4711

    docker.docker("save", "--output", str(tmp_path / "saved.tar"), "second")
    docker.docker("rm", "c1", "c2")
    docker.docker("rmi", "second", "first")
    wait_for(lambda: collected(rigs) == [], lambda: f"left: {names(rigs.daemon)}")
    docker.docker("load", "--input", str(tmp_path / "saved.tar"))
    assert docker.docker(*RUN, "--rm", "second", "cat", "/copied", "/dir/soft") == (
        "docker cp\ntwo"
    )
    with tarfile.open(tmp_path / "saved.tar") as archive:
        assert "oci-layout" in archive.getnames()


@pytest.mark.parametrize("buildkit", [False, True], ids=["classic", "buildkit"])
def test_build(rigs, tmp_path, buildkit):
    docker = rigs.docker
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_bytes(DOCKERFILE)
    (context / "root.tar").write_bytes(dockerd.busybox_tar({"gone": b"soon"}))
    (context / "extra").write_text("extra\n")
    for tag in ("built", "again"):
        docker.docker(
            "build", "--network=none", f"--tag={tag}", str(context), buildkit=buildkit
        )  # fmt: skip
    assert docker.docker(*RUN, "--rm", "built") == "built\nextra"
    docker.docker(*RUN, "--name=c1", "again", "ls", "/gone", check=False)
    tree = exported(docker, "c1", tmp_path)
    assert "gone" not in tree
    assert tree["hard"].names == ("built", "hard")


def test_restarts(rigs, tmp_path):
    """Of each of the three, with a container that runs."""
    daemon, containerd, docker = rigs
    import_first(docker)
    write = "echo up; i=0; while :; do i=$((i+1)); echo $i >/count; sleep 0.05; done"
    docker.docker(*RUN, *STOPPED_AT_ONCE, "--detach", "--name=c1", "first", "sh", "-c", write)
    assert docker.first_line_of("c1") == "up"
    sources = mounted_devices(rigs)
    assert len(sources) == 1

    def counts() -> None:
        first = docker.docker("exec", "c1", "cat", "/count")
        wait_for(lambda: docker.docker("exec", "c1", "cat", "/count") != first, "it stands")

    for end in (daemon.stop, daemon.kill):
        end()
        counts()
        daemon.start()
        await_connection(rigs)
        assert docker.docker(*RUN, "--rm", "first", "cat", "/one") == "1"
        assert mounted_devices(rigs) == sources
    containerd.kill()
    containerd.start()
    wait_for(
        lambda: docker.docker("exec", "c1", "cat", "/one", check=False) == "1",
        "dockerd does not find containerd again",
    )
    counts()
    docker.stop()
    assert mounted_devices(rigs) == set()
    docker.start()
    docker.docker("start", "c1")
    counts()
    # These use the container's own mount
    assert "count" in exported(docker, "c1", tmp_path)
    assert "A /count" in docker.docker("diff", "c1").splitlines()
    docker.docker("cp", "c1:/one", str(tmp_path / "one"))
    # containerd's differ mounts the device once more, read-only, and ext4 cannot be both at once
    assert "device or resource busy" in docker.docker("commit", "c1", "saved", check=False)
    docker.docker("stop", "c1")
    docker.docker("commit", "c1", "saved")
    assert int(docker.docker(*RUN, "--rm", "saved", "cat", "/count")) > 0


def test_commits_amid_restarts(rigs):
    """Commands under way when the daemon is killed may fail; none of them hangs or leaves a thing.

    What they have left half made goes with containerd's garbage collector.
    """
    daemon, _, docker = rigs
    import_first(docker)
    docker.docker(*RUN, "--name=c1", "first", "sh", "-c", "echo new >/new")
    ended = threading.Event()
    done: list[int] = []

    def work() -> None:
        for turn in range(1000):
            if ended.is_set():
                return
            docker.docker("commit", "c1", f"image-{turn}", check=False)
            docker.docker("create", f"--name=c-{turn}", "first", "cat", "/one", check=False)
            done.append(turn)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            before = len(done)
            wait_for(lambda: len(done) >= before + 2, docker.tail, 90)  # noqa: B023
            daemon.kill()
            daemon.start()
    finally:
        ended.set()
        thread.join()
    await_connection(rigs)
    for container in docker.docker("ps", "--all", "--filter=status=created", "--quiet").split():
        assert docker.docker("start", "--attach", container) == "1"


def test_size_of_a_container(rigs):
    docker = rigs.docker
    import_first(docker)
    fill = "dd if=/dev/zero of=/big bs=1M count=150 2>/dev/null && echo fits || echo full"
    assert docker.docker(*RUN, "--rm", "first", "sh", "-c", fill) == "full"
    # Docker does not pass it on to snapshotters
    large = (*RUN, "--rm", "--storage-opt", "size=256M")
    assert docker.docker(*large, "first", "sh", "-c", fill) == "full"
    docker.docker(
        *RUN, "--name=c1", "first", "sh", "-c", "dd if=/dev/zero of=/big bs=1M count=8 conv=fsync"
    )
    listed = docker.request("GET", "/containers/json?all=1&size=1")[1]
    assert [8 << 20 <= each["SizeRw"] < 32 << 20 for each in listed] == [True], json.dumps(listed)
