"""Commands that give a graph its pool, or a larger one."""

from typing import Annotated

import typer

from devmapper.cli.output import show
from devmapper.cli.pool import describe_usage
from devmapper.cli.settings import (
    opened_graph,
    require_no_daemon,
    require_root,
    settings_of,
)


def create(
    context: typer.Context,
    device: Annotated[
        str, typer.Option("--device", metavar="DISK", help="The whole, blank disk to use.")
    ],
    data_percent: Annotated[
        str,
        typer.Option(
            "--data-percent", metavar="N", help="Share of the disk for data; 95 by default."
        ),
    ] = "",
    metadata_percent: Annotated[
        str,
        typer.Option(
            "--metadata-percent", metavar="N", help="Share of it for metadata; 1 by default."
        ),
    ] = "",
    autoextend_threshold: Annotated[
        str,
        typer.Option(
            "--autoextend-threshold",
            metavar="N",
            help="LVM extends a pool that is N percent full; 80 by default, 100 is never.",
        ),
    ] = "",
    autoextend_percent: Annotated[
        str,
        typer.Option(
            "--autoextend-percent",
            metavar="N",
            help="By how much of its size it is extended; 20 by default.",
        ),
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a file system that is on the disk.")
    ] = False,
) -> None:
    """Make the pool of a new graph of a whole disk, with LVM.

    The disk becomes the volume group docker, and most of that the thin pool docker-thinpool, as
    Docker does it for dm.directlvm_device. A disk that holds anything is refused, and if a step
    fails, everything is undone. The graph in --root uses this pool from then on without further
    options. It takes the kernel's device mapper and Debian's package lvm2.

    Example: devmapper pool create --device /dev/sdb
    """
    require_root()
    settings = settings_of(context)
    chosen = {
        "dm.directlvm_device": device,
        "dm.thinp_percent": data_percent,
        "dm.thinp_metapercent": metadata_percent,
        "dm.thinp_autoextend_threshold": autoextend_threshold,
        "dm.thinp_autoextend_percent": autoextend_percent,
        "dm.directlvm_device_force": "true" if force else "",
    }
    words = [f"{name}={value}" for name, value in chosen.items() if value]
    require_no_daemon(settings)
    from devmapper.deviceset.make_pool import make_pool
    from devmapper.deviceset.options import parse_options
    from devmapper.engine.select import choose_engine

    options = parse_options([*settings.storage_options, *words])
    engine = choose_engine(settings.engine)
    name, made = make_pool(settings.root, options, engine)
    text = f"made pool {name} of {device}" if made else f"pool {name} was made of {device} before"
    show(settings, {"name": name, "device": device, "made": made}, text)


def resize(
    context: typer.Context,
    size: Annotated[
        str,
        typer.Argument(
            metavar="[SIZE]", help="The new size of data, such as 200G; devices need none."
        ),
    ] = "",
    metadata: Annotated[
        str, typer.Option("--metadata", metavar="SIZE", help="The new size of metadata.")
    ] = "",
) -> None:
    """Let the pool grow.

    Layers may be mounted meanwhile. A pool cannot shrink. A pool on devices of your own takes what
    they have grown by, without a size.

    Example: devmapper pool resize 200G
    """
    from devmapper.units import parse_size

    settings = settings_of(context)
    wanted = parse_size(size) if size else None
    wanted_metadata = parse_size(metadata) if metadata else None
    with opened_graph(settings) as graph:
        found = graph.resize(wanted, metadata=wanted_metadata)
    value = {
        "name": found.name,
        "data": describe_usage(found.data),
        "metadata": describe_usage(found.metadata),
    }
    show(settings, value)
