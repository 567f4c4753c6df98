"""Commands about the process that serves the pool in user space."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from devmapper.cli.output import pairs, show
from devmapper.cli.settings import (
    Settings,
    at_daemon,
    own_pool,
    require_graph,
    require_no_daemon,
    require_root,
    settings_of,
)
from devmapper.errors import ThinBusy

if TYPE_CHECKING:
    from devmapper.engine.port import Engine
    from devmapper.graph.model import ActiveDevice, EngineInfo

_RELEASE_SECONDS: Final = 1.0

app = typer.Typer(help="Look at the engine of the pool, stop it.")


@app.command()
def status(context: typer.Context) -> None:
    """Show the engine and the active devices.

    No engine is started for that.

    Example: devmapper engine status
    """
    settings = settings_of(context)
    require_root()
    require_graph(settings)
    remote = at_daemon(settings)
    found = _look(settings) if remote is None else remote.engine()
    value = {**found._asdict(), "devices": [_describe(device) for device in found.devices]}
    running = f"process {found.process}" if found.process is not None else "yes"
    rows = [
        ("Engine", f"{found.engine} {found.version}"),
        ("Pool", found.pool),
        ("Running", running if found.running else "no"),
        ("Active Devices", str(len(found.devices))),
        *(
            (f" {device.path}", f"{device.name} ({device.state}, {device.open_count} users)")
            for device in found.devices
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
    dm.thinpooldev or made of a whole disk, stays active. While a daemon holds the graph this is
    refused, too: stop the daemon before.

    Example: devmapper engine stop
    """
    settings = settings_of(context)
    from devmapper.deviceset.home import release_home
    from devmapper.deviceset.shutdown import release_devices

    require_no_daemon(settings)
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


def _look(settings: Settings) -> "EngineInfo":
    from devmapper.graph.local import engine_info

    return engine_info(*_engine(settings))


def _describe(device: "ActiveDevice") -> dict[str, object]:
    nbd = device.nbd
    return {
        **device._asdict(),
        "nbd": None
        if nbd is None
        else {"uri": nbd.uri, "read_only": nbd.read_only, "clients": list(nbd.clients)},
    }
