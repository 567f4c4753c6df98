"""Debian's dockerd 20.10 on our plugin, on both engines: what people do with it, and restarts."""

import json
import shutil
import signal
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import dockerd, export_tree
from tests.support.docker_plugin import (
    Both,
    docker_on_plugin,
    layers_of,
    mounted_layers,
    prune,
)
from tests.support.waiting import wait_for
from tests.uml.boot import SCRATCH

pytestmark = [
    pytest.mark.root,
    pytest.mark.docker,
    pytest.mark.tools,
    pytest.mark.e2e,
    pytest.mark.timeout(300),
]

DOCKERFILE = b"""\
FROM scratch
ADD root.tar /
RUN echo built >/built && rm /gone && ln /built /hard
COPY extra /extra
CMD ["cat", "/built", "/extra"]
"""
CHANGES = (
    "echo two >/two && mkdir /dir && ln /two /dir/hard && ln -s ../two /dir/soft &&"
    " mknod /dir/null c 1 3 && chmod 4711 /dir/hard && echo longer >/etc/settings && rm /gone"
)
RUN = ("run", "--network=none")
STOPPED_AT_ONCE = ("--stop-signal=KILL",)  # a shell as the first process ignores all others


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.fuse),
        pytest.param("kernel", marks=pytest.mark.kernel),
    ]
)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Both]:
    if not SCRATCH.is_dir():
        with docker_on_plugin(tmp_path, request.param) as found:
            yield found
        return
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=SCRATCH))  # thin_check needs a disk
    try:
        with docker_on_plugin(folder, request.param) as found:
            yield found
    finally:
        shutil.rmtree(folder)


def import_first(both: Both) -> None:
    files = {"etc/settings": b"short", "gone": b"soon", "one": b"1"}
    both.docker.docker("import", "-", "first", stdin=dockerd.busybox_tar(files))


def exported(both: Both, name: str, folder: Path) -> dict[str, export_tree.Inode]:
    return export_tree.of_tar(both.docker.export(name, folder / f"{name}.tar"))


def assert_all_gone(both: Both) -> None:
    """Docker has removed all that it had: nothing is mounted, no layer is left."""
    prune(both.docker)
    assert mounted_layers(both.daemon.home) == set()
    assert layers_of(both) == set()
    both.docker.stop()


def test_images_and_containers(both, tmp_path):
    docker = both.docker
    docker.start()
    info = docker.docker("info")
    assert f"Storage Driver: {docker.driver}" in info
    assert "Pool Name: docker-" in info
    import_first(both)
    docker.docker(*RUN, "--name=c1", "first", "sh", "-c", CHANGES)
    assert docker.docker("diff", "c1").splitlines() == [
        *("A /dir", "A /dir/hard", "A /dir/null", "A /dir/soft"),
        *("C /etc", "C /etc/settings", "D /gone", "A /two"),
    ]
    (tmp_path / "copied").write_text("docker cp\n")
    docker.docker("cp", str(tmp_path / "copied"), "c1:/copied")
    docker.docker("cp", "c1:/two", str(tmp_path / "two"))
    assert (tmp_path / "two").read_text() == "two\n"
    docker.docker("commit", "c1", "second")
    docker.docker(*RUN, "--name=c2", "second", "rm", "/two")
    tree = exported(both, "c2", tmp_path)
    assert "two" not in tree
    assert "copied" in tree
    assert tree["dir/hard"].mode & 0o7777 == 0o4711

    docker.docker("save", "--output", str(tmp_path / "saved.tar"), "second")
    docker.docker("rm", "c1", "c2")
    docker.docker("rmi", "second", "first")
    assert layers_of(both) == set()
    docker.docker("load", "--input", str(tmp_path / "saved.tar"))
    assert docker.docker(*RUN, "--rm", "second", "cat", "/copied", "/dir/soft") == (
        "docker cp\ntwo"
    )
    with tarfile.open(tmp_path / "saved.tar") as archive:
        assert "manifest.json" in archive.getnames()
    assert_all_gone(both)


def test_build(both, tmp_path):
    docker = both.docker
    docker.start()
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_bytes(DOCKERFILE)
    (context / "root.tar").write_bytes(dockerd.busybox_tar({"gone": b"soon"}))
    (context / "extra").write_text("extra\n")
    docker.docker("build", "--network=none", "--tag=built", str(context))
    assert docker.docker(*RUN, "--rm", "built") == "built\nextra"
    again = docker.docker("build", "--network=none", "--tag=again", str(context))
    assert again.count("Using cache") == 4
    docker.docker(*RUN, "--name=c1", "built", "ls", "/gone", check=False)
    tree = exported(both, "c1", tmp_path)
    assert "gone" not in tree
    assert tree["hard"].names == ("built", "hard")
    assert_all_gone(both)


def test_size_of_a_container(both):
    docker = both.docker
    docker.start()
    import_first(both)
    fill = "dd if=/dev/zero of=/big bs=1M count=150 2>/dev/null && echo fits || echo full"
    assert docker.docker(*RUN, "--rm", "first", "sh", "-c", fill) == "full"
    large = (*RUN, "--rm", "--storage-opt", "size=256M")
    assert docker.docker(*large, "first", "sh", "-c", fill) == "fits"
    words = docker.docker("create", "--storage-opt", "size=1M", "first", "cat", check=False)
    assert "smaller than its parent" in words
    words = docker.docker("create", "--storage-opt", "sise=1G", "first", "cat", check=False)
    assert "storage option 'sise' of a layer is unknown (the only one is size)" in words
    assert_all_gone(both)


def test_options_are_set_in_the_daemons_configuration(both):
    with pytest.raises(AssertionError, match=r"storage-opts"):
        both.docker.start("dm.basesize=1G")
    with pytest.raises(AssertionError, match=r"storage option 'dm\.nosuch' is unknown"):
        both.docker.start("dm.nosuch=1")
    both.docker.start("dm.basesize=128M")
    both.docker.stop()


def test_dockerd_restarts(both, tmp_path):
    """Its end, good and bad: containers' files stay, and nothing is counted twice."""
    docker = both.docker
    docker.start()
    import_first(both)
    write = "i=0; while :; do i=$((i+1)); echo $i >/count; sleep 0.05; done"
    docker.docker(
        *RUN, *STOPPED_AT_ONCE, "--detach", "--name=c1", "first", "sh", "-c", f"echo up; {write}"
    )
    docker.docker(*RUN, "--name=c2", "first", "sh", "-c", "echo kept >/kept")
    assert docker.first_line_of("c1") == "up"
    docker.stop()  # and with it the container
    assert mounted_layers(both.daemon.home) == set()

    docker.start()
    docker.docker("start", "c1")
    layer = docker.layer_of("c1")
    assert mounted_layers(both.daemon.home) == {layer}
    docker.kill(containers=False)
    assert mounted_layers(both.daemon.home) == {layer}
    docker.start()  # it ends the container that it finds running
    assert mounted_layers(both.daemon.home) == set()
    docker.docker("start", "c1")
    docker.kill()
    assert mounted_layers(both.daemon.home) == {layer}
    docker.start()
    assert mounted_layers(both.daemon.home) == set()
    assert int(docker.docker("cp", "c1:/count", "-", check=True) != "")
    assert "kept" in exported(both, "c2", tmp_path)
    assert_all_gone(both)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_the_daemon_restarts_amid_work(both, number, tmp_path):
    daemon, docker = both
    docker.start()
    import_first(both)
    # The first line before the first commit, which stops its processes meanwhile
    write = "echo 1 >/lines; echo up; i=1; while i=$((i+1)); do echo $i >>/lines; sleep 0.02; done"
    docker.docker(*RUN, *STOPPED_AT_ONCE, "--detach", "--name=running", "first", "sh", "-c", write)
    assert docker.first_line_of("running") == "up"
    layer = docker.layer_of("running")
    ended = threading.Event()
    done: list[str] = []

    def work(name: str) -> None:
        """Commands that may fail where they are interrupted, and may not hang."""
        for turn in range(1000):
            if ended.is_set():
                return
            docker.docker("commit", "running", f"image-{name}-{turn}", check=False)
            docker.docker("create", f"--name={name}-{turn}", "first", "cat", "/one", check=False)
            done.append(name)

    threads = [threading.Thread(target=work, args=[name]) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = len(done)
            wait_for(lambda: len(done) >= before + 2, docker.tail, 90)  # noqa: B023 - ends here
            if number == signal.SIGTERM:
                daemon.stop()
            else:
                daemon.kill()
            assert layer in mounted_layers(daemon.home)
            daemon.start()
    finally:
        ended.set()
        for thread in threads:
            thread.join()

    lines = docker.docker("exec", "running", "cat", "/lines").splitlines()
    assert lines == [str(i + 1) for i in range(len(lines))]
    docker.docker("commit", "running", "last")
    assert docker.docker(*RUN, "--rm", "last", "cat", "/lines").startswith("1\n2\n3\n")
    for container in docker.docker("ps", "--all", "--filter=status=created", "--quiet").split():
        assert docker.docker("start", "--attach", container) == "1"
    assert mounted_layers(daemon.home) == {layer}
    docker.docker("stop", "--time=0", "running")
    after = exported(both, "running", tmp_path)
    assert after["lines"].size >= len("\n".join(lines))
    prune(docker)
    assert mounted_layers(daemon.home) == set()
    left = layers_of(both)
    docker.stop()
    if number == signal.SIGTERM:
        assert left == set()
    # Docker does not know of layers whose reply a SIGKILL has swallowed, two or three a time; they
    # say whose they are
    assert len(left) <= 3 * 2 * 2
    for layer in left:
        record = json.loads((daemon.home / "metadata" / layer).read_text())
        assert record["owner"] == "docker"
