"""One home, two programs: a graph goes from Docker 20.10 to us and back, on the kernel engine.

Each dockerd takes seconds to start, so that each test is one long story.
"""

import os
from http import HTTPStatus
from pathlib import Path

import pytest

from devmapper.units import GIB
from tests.support import dockerd, export_tree
from tests.support.command import Command
from tests.support.docker_graph import (
    ENGINE,
    OPTIONS,
    assert_same,
    check_pool,
    check_spelling,
    keys_of,
    ours,
    tree,
    write,
)
from tests.support.dockerd import Dockerd

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.docker, pytest.mark.tools]

CHANGES = (
    "echo two >/two && mkdir /dir && ln /two /dir/hard && ln -s ../two /dir/soft &&"
    " mknod /dir/null c 1 3 && chmod 4711 /dir/hard && echo longer >/etc/settings && rm /gone"
)


@pytest.fixture
def docker(disk):
    with dockerd.data_root(disk) as rig:
        yield rig


def make_containers(docker: Dockerd) -> None:
    """Two images, the second on the first, and three containers: c1 ran, c2 never, c3 as well."""
    files = {"etc/settings": b"short", "gone": b"soon", "one": b"1"}
    docker.docker("import", "-", "first", stdin=dockerd.busybox_tar(files))
    docker.docker("run", "--name=c1", "--network=none", "first", "sh", "-c", CHANGES)
    docker.docker("commit", "c1", "second")
    docker.docker(
        "create", "--name=c2", "--network=none", "second", "cat", "/ours", "/etc/settings"
    )
    docker.docker("run", "--name=c3", "--network=none", "second", "rm", "/two")


def exported(docker: Dockerd, name: str, folder: Path) -> dict[str, export_tree.Inode]:
    return export_tree.of_tar(docker.export(name, folder / f"{name}.tar"))


def test_a_graph_goes_from_docker_to_us_and_back(docker, tmp_path):
    home = docker.home
    docker.start()
    make_containers(docker)
    (tmp_path / "copied").write_text("docker cp\n")
    docker.docker("cp", str(tmp_path / "copied"), "c2:/copied")
    trees = {name: exported(docker, name, tmp_path) for name in ("c1", "c2", "c3")}
    layers = {name: docker.layer_of(name) for name in trees}
    assert "copied" in trees["c2"]
    docker.stop()
    check_pool(home)

    assert check_spelling(home) == 9  # base, two images, three containers with an -init layer each
    with ours(home) as driver:
        assert len(driver.layers()) == 8
        for name, layer in layers.items():
            assert_same(tree(driver, layer), trees[name])
        write(driver, layers["c2"], {"ours": b"written by us\n"})
        trees["c2"] = tree(driver, layers["c2"])
        driver.create("child", layers["c1"])
        write(driver, "child", {"child": b"of c1"})
        driver.remove(layers["c3"])
        driver.devices.resize_pool(2 * GIB)
    assert keys_of(home, "child") == keys_of(home, layers["c1"])
    check_spelling(home)

    docker.start()
    info = dict(line.strip().partition(": ")[::2] for line in docker.docker("info").splitlines())
    assert info["Data Space Total"] == "2.147GB"
    assert docker.docker("start", "--attach", "c2") == "written by us\nlonger"
    assert_same(exported(docker, "c2", tmp_path), trees["c2"])
    assert_same(exported(docker, "c1", tmp_path), trees["c1"])
    # Its layer is gone: Docker says so, and can still forget the container
    assert docker.request("POST", "/containers/c3/start")[0] == HTTPStatus.INTERNAL_SERVER_ERROR
    docker.docker("rm", "c3")
    docker.docker("commit", "c2", "third")
    assert docker.docker("run", "--name=c4", "--network=none", "third", "cat", "/ours") == (
        "written by us"
    )
    trees["c4"] = exported(docker, "c4", tmp_path)
    layers["c4"] = docker.layer_of("c4")
    docker.docker("rm", "c1")
    docker.stop()
    check_pool(home)

    check_spelling(home)
    with ours(home) as driver:
        assert not driver.exists(layers["c1"])
        assert not driver.exists(layers["c3"])
        assert_same(tree(driver, layers["c4"]), trees["c4"])
        found = tree(driver, "child")
        assert found.keys() - {"child"} == trees["c1"].keys()
        driver.remove("child")


def test_the_command_works_on_dockers_graph(docker, tmp_path):
    docker.start()
    make_containers(docker)
    layer = docker.layer_of("c1")
    docker.stop()

    command = Command(docker.home, OPTIONS, engine=ENGINE)
    listed = {entry["id"] for entry in command("--json", "ls").json}
    assert layer in listed
    root = Path(command("get", layer).text.strip())
    assert (root / "two").read_text() == "two\n"
    (root / "two").write_text("ours\n")
    os.sync()
    command("put", layer)
    command("create", "child", "--parent", layer)
    command("rm", "child")
    command("engine", "stop")
    check_pool(docker.home)

    docker.start()
    docker.docker("commit", "c1", "changed")
    assert docker.docker("run", "--network=none", "changed", "cat", "/two") == "ours"
    docker.stop()
    check_pool(docker.home)
