"""Our daemon and a real dockerd that has it for its storage driver."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.linux import mount
from tests.support import dockerd
from tests.support.daemon import Daemon, served
from tests.support.debian import HERE, Programs
from tests.support.dockerd import Dockerd

PLUGINS: Final = Path("/run/docker/plugins")  # where Docker looks for sockets
OPTIONS: Final = (
    "dm.loopdatasize=2G",
    "dm.loopmetadatasize=16M",
    "dm.basesize=128M",
    "dm.override_udev_sync_check=true",
)
_NUMBERS: Final = itertools.count()


class Both(NamedTuple):
    daemon: Daemon
    docker: Dockerd


@contextmanager
def plugin_socket() -> Iterator[Path]:
    """A place for a socket that Docker finds by its name, and that nobody else has."""
    missing = [path for path in (PLUGINS, PLUGINS.parent) if not path.exists()]
    PLUGINS.mkdir(parents=True, exist_ok=True)
    path = PLUGINS / f"dmt-{os.getpid()}-{next(_NUMBERS)}.sock"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        for folder in missing:
            with suppress(OSError):  # another test, or a Docker of this machine, uses it
                folder.rmdir()


@contextmanager
def docker_on_plugin(
    folder: Path, engine: str, programs: Programs = HERE, options: tuple[str, ...] = OPTIONS
) -> Iterator[Both]:
    """Both of them, the daemon started; at the end nothing of either is left."""
    with (
        plugin_socket() as socket,
        # Clients that are killed are what these tests are about: the daemon says so in its log
        served(
            folder, storage_options=options, engine=engine, docker_socket=socket, check_log=False
        ) as daemon,
        dockerd.data_root(folder, socket.stem, programs) as docker,
    ):
        yield Both(daemon, docker)


def mounted_layers(home: Path) -> set[str]:
    """The layers of the graph in *home* that are mounted."""
    top = Path(os.path.realpath(home)) / "mnt"
    points = [entry.mount_point for entry in mount.mountinfo()]
    return {point.name for point in points if point.parent == top}


def layers_of(both: Both) -> set[str]:
    """All layers, the base aside, from the records on disk."""
    return {
        entry.name
        for entry in (both.daemon.home / "metadata").iterdir()
        if not entry.name.startswith(".")
        and entry.name not in ("base", "deviceset-metadata", "transaction-metadata")
    }


def prune(docker: Dockerd) -> None:
    """Docker forgets all that it has."""
    if containers := docker.docker("ps", "--all", "--quiet").split():
        docker.docker("rm", "--force", *containers)
    docker.docker("system", "prune", "--all", "--force")
