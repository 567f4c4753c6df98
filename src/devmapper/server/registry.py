"""Which services there are, and how each is made; what is not wanted is not even imported."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from devmapper.server.address import Address
from devmapper.server.config import Config
from devmapper.server.service import Service

if TYPE_CHECKING:
    from devmapper.driver import Driver
    from devmapper.server.observer import Observer
    from devmapper.server.operations import Operations
    from devmapper.snapshots import Snapshots


class Ground(NamedTuple):
    """What the services stand on."""

    driver: "Driver"
    snapshots: "Snapshots"
    operations: "Operations"
    observer: "Observer"
    config: Config


class Plan(NamedTuple):
    """A service that is wanted."""

    name: str
    address: Address
    make: Callable[[Ground, Any], Service]  # of the ground and the address


def plans(config: Config, control: Path) -> list[Plan]:
    """The services that *config* wants, in the order in which they start."""
    wanted = [Plan("control", control, _control)]
    if config.docker_enabled:
        wanted.append(Plan("docker", config.docker_socket, _docker))
    if config.containerd_enabled:
        wanted.append(Plan("containerd", config.containerd_socket, _containerd))
    if config.metrics_enabled:
        wanted.append(Plan("metrics", config.metrics_address, _metrics))
    return wanted


def _control(ground: Ground, socket: Path) -> Service:
    from devmapper.server.control.service import ControlService

    return ControlService(
        ground.driver, ground.snapshots, ground.operations, socket, observer=ground.observer
    )


def _docker(ground: Ground, socket: Path) -> Service:
    from devmapper.server.docker.service import DockerPlugin

    return DockerPlugin(ground.driver, socket, ground.operations)


def _containerd(ground: Ground, socket: Path) -> Service:
    from devmapper.server.containerd.service import SnapshotsService

    return SnapshotsService(ground.snapshots, socket, ground.operations)


def _metrics(ground: Ground, address: Address) -> Service:
    from devmapper.server.metrics.service import MetricsService

    return MetricsService(
        ground.driver,
        ground.snapshots,
        ground.operations,
        address,
        observer=ground.observer,
        max_layers=ground.config.metrics_max_layers,
        layers_interval=ground.config.metrics_layers_interval,
    )
