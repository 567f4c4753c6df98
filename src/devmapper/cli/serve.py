"""`devmapper serve`: the storage daemon in this process."""

import logging
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from devmapper.cli.settings import Settings, require_root, settings_of

log = logging.getLogger(__name__)

# Options before the command and the keys that are the same
_GLOBAL: Final = {
    "root": "root",
    "storage_opt": "storage-opts",
    "engine_name": "engine",
    "id_map": "id-maps",
}


def serve(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="TOML file; /etc/devmapper/config.toml by default, if it is there.",
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(metavar="DIR", help="Directory of the graph.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who serves the pool: auto, kernel or embedded."),
    ] = None,
    storage_opt: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the driver; repeatable."),
    ] = None,
    id_map: Annotated[
        list[str] | None,
        typer.Option(metavar="CONTAINER:HOST:SIZE", help="Ids of a user namespace; repeatable."),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="auto, journal (with priorities) or text (with times).",
        ),
    ] = None,
    on_stop: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="keep the pool and the mounts when the daemon ends, or release them.",
        ),
    ] = None,
    stop_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How long requests under way are waited for when the daemon ends: 30s.",
        ),
    ] = None,
    control_socket: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where our own commands ask.")
    ] = None,
    docker: Annotated[
        bool | None,
        typer.Option("--docker/--no-docker", help="Serve Docker's plugin.", show_default=False),
    ] = None,
    docker_socket: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The plugin's socket; its name is the driver's."),
    ] = None,
    containerd: Annotated[
        bool | None,
        typer.Option(
            "--containerd/--no-containerd",
            help="Serve containerd's snapshotter.",
            show_default=False,
        ),
    ] = None,
    containerd_socket: Annotated[
        str | None, typer.Option(metavar="PATH", help="The snapshotter's socket.")
    ] = None,
    metrics: Annotated[
        bool | None,
        typer.Option("--metrics/--no-metrics", help="Serve metrics.", show_default=False),
    ] = None,
    metrics_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Where Prometheus asks: HOST:PORT or unix:PATH."),
    ] = None,
    metrics_max_layers: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="How many layers have series of their own."),
    ] = None,
    metrics_layers_interval: Annotated[
        str | None, typer.Option(metavar="TIME", help="How old the layers' sizes may be: 60s.")
    ] = None,
    watch: Annotated[
        bool | None,
        typer.Option(
            "--watch/--no-watch",
            help="Look at the pool every so often, and warn in the log.",
            show_default=False,
        ),
    ] = None,
    watch_interval: Annotated[
        str | None, typer.Option(metavar="TIME", help="How often: 10s.")
    ] = None,
    watch_data_low_water: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Percent of data that should be free."),
    ] = None,
    watch_metadata_low_water: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Percent of metadata that should be free."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print what would be served, and end.")
    ] = False,
) -> None:
    """Serve the graph to Docker, containerd and others.

    Prometheus and our own commands are the others. The daemon runs in the foreground and logs to
    stderr. SIGTERM ends it when the requests under way have ended; a second one does not wait for
    them. What is mounted stays mounted, also when it is killed, and the next daemon goes on.

    Every key of the file is an option here, which wins, also over an option before the command. A
    service whose table is in the file, or one of whose options is given, is served.

    Example: devmapper serve --docker --containerd --metrics-address 127.0.0.1:9273
    """
    given = {
        "root": None if root is None else str(Path(root).absolute()),
        "engine": engine,
        "storage-opts": storage_opt or None,
        "id-maps": id_map or None,
        "log-level": log_level,
        "log-format": log_format,
        "on-stop": on_stop,
        "stop-time": stop_time,
        "control.socket": control_socket,
        "docker.enabled": docker,
        "docker.socket": docker_socket,
        "containerd.enabled": containerd,
        "containerd.socket": containerd_socket,
        "metrics.enabled": metrics,
        "metrics.address": metrics_address,
        "metrics.max-layers": metrics_max_layers,
        "metrics.layers-interval": metrics_layers_interval,
        "watch.enabled": watch,
        "watch.interval": watch_interval,
        "watch.data-low-water": watch_data_low_water,
        "watch.metadata-low-water": watch_metadata_low_water,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    from devmapper.server import config as configuration

    effective = effective_config(context, config, chosen)
    if print_config:
        print(configuration.to_toml(effective), end="")
        return
    require_root()
    _run(effective)


def effective_config(context: typer.Context, file: str | None, chosen: dict[str, Any]) -> Any:  # noqa: ANN401
    """Defaults, the file, the options before the command, *chosen*: later ones win."""
    from devmapper.server import config as configuration

    found = configuration.Config()
    path = Path(file) if file is not None else configuration.DEFAULT_FILE
    if file is not None or path.exists():
        found = configuration.with_file(found, path)
    return configuration.with_options(found, _before_the_command(context) | chosen)


def _before_the_command(context: typer.Context) -> dict[str, Any]:
    top = context.find_root()
    settings = settings_of(context)
    values: dict[str, Any] = {
        "root": str(settings.root.absolute()),
        "storage-opts": settings.storage_options,
        "engine": settings.engine,
        "id-maps": [str(each) for each in settings.id_maps],
    }
    given = {}
    for parameter, name in _GLOBAL.items():
        source = top.get_parameter_source(parameter)
        if source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT"):
            given[name] = values[name]
    if settings.verbose:
        given["log-level"] = _level(settings)
    return given


def _level(settings: Settings) -> str:
    return "debug" if settings.verbose > 1 else "info"


def _run(effective: Any) -> None:  # noqa: ANN401
    from devmapper.cli.border import Terminated
    from devmapper.server import logs
    from devmapper.server.daemon import serve as serve_graph
    from devmapper.server.ending import ignore_hangup

    ignore_hangup()
    logs.start(effective.log_level, effective.log_format)
    try:
        serve_graph(effective)
    except (Terminated, KeyboardInterrupt):
        log.info("told to end while it started")
