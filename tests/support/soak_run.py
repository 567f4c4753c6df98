"""A run of the soak: all clients on one daemon, and a look at everything afterwards."""

import os
import random
import statistics
import time
from pathlib import Path

import pytest

from devmapper.driver import init
from devmapper.engine.runtime import runtime_base
from devmapper.linux import mount
from tests.support.daemon import Daemon, served
from tests.support.graphs import check_consistent, records
from tests.support.layers_client import PluginClient
from tests.support.snapshots_client import connected
from tests.support.soak import SHARED, Client, Rig, write_files
from tests.support.soak_containerd import ContainerdClient
from tests.support.soak_containerd import mount as attach
from tests.support.soak_docker import DockerClient

OPTIONS = (
    "dm.basesize=64M",
    "dm.loopdatasize=6G",
    "dm.loopmetadatasize=64M",
    "dm.override_udev_sync_check=true",
)
PAIRS = 12


def soak(folder: Path, seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Docker's and containerd's clients work for so long; *folder* is on a disk.

    `SOAK_SECONDS=600 SOAK_SEED=7` makes it long, and repeats the choices of a run (not its timing).
    """
    seconds = float(os.environ.get("SOAK_SECONDS") or seconds)
    seed = int(os.environ.get("SOAK_SEED") or random.randrange(1_000_000))
    print(f"SOAK_SEED={seed}")
    places = folder / "places"
    places.mkdir()
    with served(
        folder, storage_options=OPTIONS, docker=True, containerd=True, check_log=False
    ) as daemon:
        rig = Rig(daemon, places, seed)
        make_shared(rig)
        containerd = [ContainerdClient(rig, f"c{n}", seed + n) for n in range(PAIRS)]
        docker = [DockerClient(rig, f"d{n}", seed + 100 + n) for n in range(PAIRS)]
        clients: list[Client] = [*containerd, *docker]
        begin = time.monotonic()
        try:
            rig.run(clients, seconds)
            took = time.monotonic() - begin
            check_everything(daemon, containerd, docker)
            with rig.at_once([client.end for client in clients]):
                pass
            remove_shared(rig)
        except BaseException:
            for entry in reversed(mount.mountinfo()):
                if str(entry.mount_point).startswith(str(places)):
                    mount.unmount(entry.mount_point, flags=mount.UmountFlag.DETACH)
            raise
        finally:
            for client in clients:
                client.close()
        assert list(places.iterdir()) == []
        daemon.stop()
        check_nothing_left(daemon)
        check_log(daemon)
    total = sum(rig.operations.values())
    with capsys.disabled():
        print(
            f"\n{PAIRS} clients each of Docker and containerd, {took:.0f} s: {total} requests,"
            f" {total / took:.0f} a second; {rig.kills} kills, the next daemon was ready after"
            f" {sum(rig.waits) / len(rig.waits):.1f} s (at most {max(rig.waits):.1f} s)"
        )
        for name, times in sorted(rig.seconds.items()):
            median, longest = statistics.median(times), max(times)
            print(f"{name:12} {len(times):6}  median {median:6.3f} s, at most {longest:6.3f} s")


def make_shared(rig: Rig) -> None:
    (files,) = rig.shared.values()
    with connected(rig.daemon.containerd) as containerd:
        place = rig.folder / SHARED
        place.mkdir()
        attach(containerd.prepare("key"), place)
        write_files(place, files)
        mount.unmount(place)
        place.rmdir()
        containerd.commit(SHARED, "key")
    docker = PluginClient(rig.daemon.docker)
    docker.create(SHARED)
    write_files(docker.get(SHARED), files)
    docker.put(SHARED)
    docker.close()


def remove_shared(rig: Rig) -> None:
    with connected(rig.daemon.containerd) as containerd:
        containerd.remove(SHARED)
    docker = PluginClient(rig.daemon.docker)
    docker.remove(SHARED)
    docker.close()


def check_everything(
    daemon: Daemon, containerd: list[ContainerdClient], docker: list[DockerClient]
) -> None:
    """What all clients together know of is all there is."""
    with connected(daemon.containerd) as client:
        known = {SHARED, *(name for each in containerd for name in each.snapshots)}
        assert set(client.names()) == known
    found = records(daemon.home)
    assert not [name for name, record in found.items() if record["deleted"]]
    owners: dict[object, set[str]] = {}
    for name, record in found.items():
        owners.setdefault(record.get("owner"), set()).add(name)
    assert owners.pop(None) == {"base"}
    assert owners.pop("docker", set()) == {
        SHARED,
        *(name for each in docker for name in each.layers),
    }
    assert len(owners.pop("containerd")) == len(known) + 1
    assert not owners


def check_nothing_left(daemon: Daemon) -> None:
    with init(daemon.home, OPTIONS, engine=daemon.command.engine) as driver:  # type: ignore[arg-type]
        devices = driver.devices
        check_consistent(daemon.home, devices)
        assert records(daemon.home).keys() == {"base", "snapshot-root"}
        assert devices.pool.devices() == []
        one, other = driver.usage()
        status = devices.pool.status()
        reached = one.mapped + other.exclusive  # a root and base have no others
        assert status.used_data_blocks * status.block_size == reached, (status, one, other)
        prefix = devices.parts.graph.names.prefix
    for kind in ("users", "transfers"):
        left = runtime_base() / f"{prefix}-{kind}"
        assert not left.exists() or os.listdir(left) == []
    assert [path.name for path in (daemon.home / "mnt").iterdir()] == []
    mounts = [entry.mount_point for entry in mount.mountinfo()]
    assert not [place for place in mounts if str(place).startswith(f"{daemon.home}/")]
    left_sockets = {path.name for path in daemon.sockets.iterdir()}
    assert left_sockets == {"config.toml", "log", "notify"}


def check_log(daemon: Daemon) -> None:
    lines = daemon.log.read_text().splitlines()
    bad = [line for line in lines if " ERROR " in line or "Traceback" in line]
    assert bad == []
