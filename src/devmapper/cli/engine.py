"""Commands about the process that serves the pool in user space."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from devmapper.cli.output import pairs, show
from devmapper.cli.settings import (
    Settings,
    own_pool,
    require_graph,
    require_root,
    settings_of,
)
from devmapper.errors import ThinBusy

if TYPE_CHECKING:
    from devmapper.engine.port import DeviceInfo, Engine

_RELEASE_SECONDS: Final = 1.0

app = typer.Typer(help="Look at the engine of the pool, stop it.")


@app.command()
def status(context: typer.Context) -> None:
    """Show the engine and the active devices.

    No engine is started for that.

    Example: devmapper engine status
    """
    settings = settings_of(context)
    engine, name = _engine(settings)
    features = engine.features()
    pool = engine.find_pool(name)
    devices = [] if pool is None else pool.devices()
    process, log = _process(name) if features.name == "embedded" else (None, None)
    value = {
        "engine": features.name,
        "version": features.driver_version,
        "pool": name,
        "running": pool is not None,
        "process": process if pool is not None else None,
        "log": log,
        "devices": [_describe(device) for device in devices],
    }
    running = f"process {process}" if process is not None else "yes"
    rows = [
        ("Engine", f"{features.name} {features.driver_version}"),
        ("Pool", name),
        ("Running", running if pool is not None else "no"),
        ("Active Devices", str(len(devices))),
        *(
            (f" {device.path}", f"{device.name} ({device.state}, {device.open_count} users)")
            for device in devices
        ),
    ]
    show(settings, value, pairs(rows))


@app.command()
def stop(
    context: typer.Context,
    force: Annotated[bool, typer.Option("--force", help="Unmount the layers first.")] = False,
) -> None:
    """Stop the engine.

    All I/O is written, the pool is committed, and its devices are gone afterwards. The next command
    that needs the pool starts it again. While a layer is mounted this is refused, unless --force
    is given; a layer whose files are open stays in any case. A pool that was given to the graph, by
    dm.thinpooldev or made of a whole disk, stays active.

    Example: devmapper engine stop
    """
    settings = settings_of(context)
    from devmapper.deviceset.home import release_home
    from devmapper.deviceset.shutdown import release_devices

    engine, name = _engine(settings)
    is_given = own_pool(settings)[0].thin_pool_device is not None
    pool = engine.find_pool(name)
    if pool is not None and force:
        # Not by way of the driver: it opens no graph that is damaged
        release_devices(pool)
    try:
        if not is_given:
            engine.deactivate_pool(name)
    except ThinBusy as err:
        err.hint = "unmount the layers with devmapper put, or use devmapper engine stop --force"
        raise
    release_home(settings.root, seconds=_RELEASE_SECONDS)
    show(settings, {"pool": name, "stopped": pool is not None and not is_given})


def _engine(settings: Settings) -> "tuple[Engine, str]":
    """The engine and the name of the graph's pool; nothing is started."""
    require_root()
    require_graph(settings)
    from devmapper.engine.select import choose_engine

    return choose_engine(settings.engine), own_pool(settings)[1]


def _process(pool: str) -> tuple[int | None, str]:
    from devmapper.engine.embedded import runtime

    paths = runtime.paths_of(pool)
    identity = runtime.read_pid(paths)
    return None if identity is None else identity.pid, str(paths.log)


def _describe(device: "DeviceInfo") -> dict[str, object]:
    return {
        "name": device.name,
        "thin_id": device.thin_id,
        "size": device.size,
        "path": str(device.path),
        "state": str(device.state),
        "open_count": device.open_count,
        "nbd": None
        if device.nbd is None
        else {
            "uri": device.nbd.uri(),
            "read_only": device.nbd.read_only,
            "clients": list(device.nbd.clients),
        },
    }
