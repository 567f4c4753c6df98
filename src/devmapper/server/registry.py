"""Which services there are, and how each is made; what is not wanted is not even imported."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from devmapper.errors import EnvironmentLacking
from devmapper.server.address import Address, show_address
from devmapper.server.config import Config
from devmapper.server.service import Service

if TYPE_CHECKING:
    from pathlib import Path

    from devmapper.driver import Driver
    from devmapper.server.observer import Observer
    from devmapper.server.operations import Operations


class Ground(NamedTuple):
    """What the services stand on."""

    driver: "Driver"
    snapshots: Any
    operations: "Operations"
    control: "Path"
    observer: "Observer"


class Plan(NamedTuple):
    """A service that is wanted."""

    name: str
    address: Address
    make: Callable[[Ground], Service]

    def __str__(self) -> str:
        return f"{self.name} on {show_address(self.address)}"


_PLACES: Final = {
    "control": "devmapper.server.control.service:ControlService",
    "docker": "devmapper.server.docker.service:DockerPlugin",
    "containerd": "devmapper.server.containerd.service:SnapshotsService",
    "metrics": "devmapper.server.metrics.service:MetricsService",
    "snapshots": "devmapper.snapshots.snapshots:Snapshots",
}


def plans(config: Config, control: "Path") -> list[Plan]:
    """The services that *config* wants, in the order in which they start."""
    wanted = []
    if is_there("control"):
        wanted.append(Plan("control", control, _control))
    if config.docker_enabled:
        socket = config.docker_socket
        wanted.append(Plan("docker", socket, lambda ground: _docker(ground, socket)))
    if config.containerd_enabled:
        place = config.containerd_socket
        wanted.append(Plan("containerd", place, lambda ground: _containerd(ground, place)))
    if config.metrics_enabled:
        address = config.metrics_address
        wanted.append(Plan("metrics", address, lambda ground: _metrics(ground, address)))
    return wanted


def is_there(name: str) -> bool:
    """Whether this installation has it."""
    try:
        imported(name)
    except EnvironmentLacking:
        return False
    return True


def imported(name: str) -> Any:  # noqa: ANN401 - a class of a module that is imported by its name
    """The class of a service; `EnvironmentLacking` if this installation lacks its module."""
    module, _, member = _PLACES[name].partition(":")
    try:
        return getattr(import_module(module), member)
    except ModuleNotFoundError as err:
        raise EnvironmentLacking(f"the {name} service lacks Python module {err.name!r}") from err


def _control(ground: Ground) -> Service:
    made: Service = imported("control")(
        ground.driver,
        ground.snapshots,
        ground.operations,
        ground.control,
        observer=ground.observer,
    )
    return made


def _docker(ground: Ground, socket: "Path") -> Service:
    made: Service = imported("docker")(ground.driver, socket, ground.operations)
    return made


def _containerd(ground: Ground, socket: "Path") -> Service:
    made: Service = imported("containerd")(ground.snapshots, socket, ground.operations)
    return made


def _metrics(ground: Ground, address: Address) -> Service:
    made: Service = imported("metrics")(
        ground.driver, ground.snapshots, ground.operations, address, observer=ground.observer
    )
    return made
