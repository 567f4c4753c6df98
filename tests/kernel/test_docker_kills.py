"""The same home after a SIGKILL: of Docker amid creates, and of us amid ours."""

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Final

import pytest

from devmapper.errors import LayerBusy
from tests.support import dockerd, layer_churn
from tests.support.docker_graph import ENGINE, OPTIONS, check_agreement, ours, tree, write
from tests.support.dockerd import Dockerd

pytestmark = [pytest.mark.root, pytest.mark.kernel, pytest.mark.docker, pytest.mark.tools]

ROUNDS: Final = 4
THREADS: Final = 3
SPEC: Final = {"Image": "first", "Cmd": ["cat", "/one"], "HostConfig": {"NetworkMode": "none"}}


@pytest.fixture
def docker(disk):
    with dockerd.data_root(disk) as rig:
        yield rig


class Churn:
    """Threads that make containers and remove every other one, until nobody answers."""

    def __init__(self, docker: Dockerd) -> None:
        self._docker = docker
        self._many = threading.Semaphore(0)
        self.made: set[str] = set()  # full ids of containers that were neither lost nor removed
        self.errors: list[object] = []

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self._many.acquire(timeout=60), self._docker.tail()

    def run(self) -> None:
        try:
            while True:
                self._one(keep=True)
                self._one(keep=False)
        except OSError:
            return  # it was killed
        except AssertionError as err:
            self.errors.append(err)

    def _one(self, *, keep: bool) -> None:
        status, reply = self._docker.request("POST", "/containers/create", SPEC)
        assert status == HTTPStatus.CREATED, reply
        container = str(reply["Id"])
        self._many.release()
        if keep:
            self.made.add(container)
            return
        status, reply = self._docker.request("DELETE", f"/containers/{container}")
        assert status == HTTPStatus.NO_CONTENT, reply


@contextmanager
def churning(docker: Dockerd) -> Iterator[Churn]:
    churn = Churn(docker)
    threads = [threading.Thread(target=churn.run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield churn
    finally:
        if docker.running:
            docker.kill()
        for thread in threads:
            thread.join()
    assert churn.errors == []


def import_first(docker: Dockerd) -> None:
    files = {"one": b"1\n"}
    docker.docker("import", "-", "first", stdin=dockerd.busybox_tar(files))


def a_moment(chance: random.Random, most: float) -> None:
    """Let *most* seconds or less go by, so that a kill meets any step."""
    threading.Event().wait(chance.uniform(0, most))


def test_docker_is_killed_amid_creates(docker):
    chance = random.Random(5)
    docker.start()
    import_first(docker)
    kept: set[str] = set()
    for _ in range(ROUNDS):
        with churning(docker) as churn:
            churn.wait_for(chance.randrange(2, 12))
            a_moment(chance, 0.4)
            docker.kill()
        kept |= churn.made
        layers = {each: dockerd.layer_of(docker.data_root, each) for each in kept}
        with ours(docker.home) as driver:
            assert set(layers.values()) <= set(driver.layers())
            for container in sorted(churn.made):
                assert (Path(driver.get(layers[container])) / "one").read_text() == "1\n"
                driver.put(layers[container])
        docker.start()
        listed = docker.docker("ps", "--all", "--quiet", "--no-trunc").splitlines()
        assert kept <= set(listed)
        one = chance.choice(sorted(kept))
        assert docker.docker("start", "--attach", one) == "1"
    docker.stop()
    with ours(docker.home):
        pass


@contextmanager
def our_process(home: Path, parent: str) -> Iterator["subprocess.Popen[str]"]:
    words = [sys.executable, "-m", "tests.support.layer_churn", str(home), parent, ENGINE]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def test_we_are_killed_amid_creates_and_removes(docker):
    chance = random.Random(7)
    docker.start()
    import_first(docker)
    docker.docker("run", "--name=c1", "--network=none", "first", "cat", "/one")
    parent = docker.layer_of("c1")
    docker.stop()
    kept: list[str] = []
    for number in range(2 * ROUNDS):
        with our_process(docker.home, parent) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{layer_churn.READY}\n"
            kept += [process.stdout.readline().strip() for _ in range(chance.randrange(1, 4))]
            a_moment(chance, 0.1)
            process.send_signal(signal.SIGKILL)
            # What it told before it died counts, but for half a line
            kept += [line.strip() for line in process.stdout if line.endswith("\n")]
        if number % 2:  # Docker is the first to find it
            docker.start()
            assert docker.docker("run", "--rm", "--network=none", "first", "cat", "/one") == "1"
            assert docker.docker("start", "--attach", "c1") == "1"
            docker.stop()
        with ours(docker.home) as driver:
            assert set(kept) <= set(driver.layers())
            for layer in kept:
                assert (Path(driver.get(layer)) / "content").read_bytes() == layer_churn.CONTENT
                while driver.devices.is_mounted(layer):  # it was, when its process died
                    driver.put(layer)
                driver.remove(layer)
            kept.clear()


def test_docker_is_killed_while_a_container_runs(docker):
    """The container goes on without dockerd; its layer is mounted, and we work beside it."""
    docker.start()
    import_first(docker)
    script = "echo $$ >/started; echo running; while :; do sleep 1; done"
    docker.docker("run", "--detach", "--name=c1", "--network=none", "first", "sh", "-c", script)
    docker.docker("create", "--name=c2", "--network=none", "first", "cat", "/one")
    busy, idle = docker.layer_of("c1"), docker.layer_of("c2")
    assert docker.first_line_of("c1") == "running"
    docker.kill(containers=False)

    import devmapper

    with devmapper.init(docker.home, OPTIONS, engine=ENGINE) as driver:
        check_agreement(driver)
        assert driver.devices.is_mounted(busy)
        with pytest.raises(LayerBusy):
            driver.remove(busy)
        root = Path(driver.get(busy))
        assert (root / "started").exists()
        (root / "ours").write_text("beside it\n")
        driver.create("snapshot", busy)
        driver.put(busy)
        assert driver.devices.is_mounted(busy)
        assert (Path(driver.get("snapshot")) / "ours").read_text() == "beside it\n"
        driver.put("snapshot")
        write(driver, idle, {"one": b"changed\n"})

    docker.start()
    assert docker.docker("inspect", "--format={{.State.Running}}", "c1") == "false"
    assert docker.docker("start", "--attach", "c2") == "changed"
    docker.docker("commit", "c1", "second")
    assert docker.docker("run", "--network=none", "second", "cat", "/ours") == "beside it"
    docker.stop()
    with ours(docker.home) as driver:
        assert tree(driver, "snapshot").keys() >= {"started", "ours", "one"}
