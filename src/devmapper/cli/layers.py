"""Commands about layers as a whole: make, mount, list, look at, remove."""

from typing import TYPE_CHECKING, Annotated, Final

import typer

from devmapper.cli import border
from devmapper.cli.arguments import Layer, Layers, NewLayer, Parent
from devmapper.cli.output import Column, pairs, printable, show, table
from devmapper.cli.settings import check_layer_ids, opened_graph, settings_of
from devmapper.errors import DevmapperError, PoolMismatch

if TYPE_CHECKING:
    from devmapper.graph.model import LayerRow

_COLUMNS: Final = (
    Column("ID"),
    Column("SIZE", is_number=True),
    Column("MAPPED", is_number=True),
    Column("EXCLUSIVE", is_number=True),
    Column("SHARED", is_number=True),
    Column("STATE"),
    Column("OWNER"),
)


def info(context: typer.Context) -> None:
    """Show the driver's state, as docker info does.

    Example: devmapper info
    """
    settings = settings_of(context)
    with opened_graph(settings) as graph:
        found = graph.info()
    value = {
        "driver": found.driver,
        "root": str(settings.root),
        "engine": found.engine,
        "layers": found.layers,
        "status": dict(found.status),
    }
    show(settings, value, f"Storage Driver: {found.driver}\n{pairs(found.status)}")


def create(
    context: typer.Context,
    layer: NewLayer,
    parent: Parent = "",
    size: Annotated[
        str,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Size of the layer, such as 20G; by default its parent's.",
        ),
    ] = "",
) -> None:
    """Make a layer.

    It is a snapshot of its parent, or of the empty base layer, and takes no space of its own until
    it is written to. The graph and its pool are made, too, if there are none yet. With a size its
    file system grows, which takes a moment; no layer is smaller than its parent.

    Example: devmapper create web1 --parent debian --size 20G
    """
    settings = settings_of(context)
    check_layer_ids(layer, *filter(None, [parent]))
    wanted = None
    if size:
        from devmapper.units import parse_size

        wanted = parse_size(size)
    with opened_graph(settings, create=True) as graph:
        graph.create(layer, parent, size=wanted)
    show(settings, {"id": layer, "parent": parent})


def get(
    context: typer.Context,
    layer: Layer,
    label: Annotated[
        str,
        typer.Option("--mount-label", metavar="LABEL", help="SELinux label of all of its files."),
    ] = "",
) -> None:
    """Mount a layer and print the directory with its files.

    A layer that is mounted already stays as it is; one put unmounts it.

    Example: ls "$(devmapper get web1)"
    """
    from devmapper.deviceset.mountopts import check_label

    settings = settings_of(context)
    check_layer_ids(layer)
    check_label(label)
    with opened_graph(settings) as graph:
        path = graph.get(layer, label)
    show(settings, {"id": layer, "path": path}, path)


def put(context: typer.Context, layer: Layer) -> None:
    """Unmount a layer that get has mounted.

    Example: devmapper put web1
    """
    settings = settings_of(context)
    check_layer_ids(layer)
    with opened_graph(settings) as graph:
        graph.put(layer)
    show(settings, {"id": layer})


def rm(
    context: typer.Context,
    layers: Layers,
    force: Annotated[
        bool, typer.Option("--force", help="Also those of Docker and of containerd.")
    ] = False,
) -> None:
    """Remove layers.

    The blocks that only they use are free again. Each layer is removed for itself: one that cannot
    be removed does not keep the others.

    A layer in use is busy. With dm.use_deferred_deletion it is gone for everybody at once, and its
    blocks become free when its last user is gone, which is said.

    A layer that Docker or containerd has made through the daemon is theirs to remove: it is refused
    unless --force is given. A snapshot of containerd that has children stays in any case.

    Example: devmapper rm web1 web2
    """
    settings = settings_of(context)
    check_layer_ids(*layers)
    removed = []
    put_off = []
    failed = 0
    with opened_graph(settings) as graph:
        for layer in layers:
            try:
                if graph.remove(layer, force=force):
                    put_off.append(layer)
                removed.append(layer)
            except (DevmapperError, OSError) as err:
                status = border.report(err, settings)
                failed = failed or status
    words = [f"{layer}: in use, deleted when its last user is gone" for layer in put_off]
    show(settings, {"removed": removed, "put_off": put_off}, "\n".join(words))
    if failed:
        raise typer.Exit(failed)


def exists(context: typer.Context, layer: Layer) -> None:
    """Tell by the exit code if a layer exists.

    It ends with 0 if the layer exists, with 1 if it does not, without a word.

    Example: devmapper exists web1 && echo yes
    """
    settings = settings_of(context)
    check_layer_ids(layer)
    with opened_graph(settings) as graph:
        found = graph.exists(layer)
    show(settings, {"id": layer, "exists": found})
    if not found:
        raise typer.Exit(1)


def ls(context: typer.Context) -> None:
    """List the layers and the space they take.

    EXCLUSIVE is what removing the layer gives back; SHARED blocks are also another layer's. The
    base layer, which every layer without a parent starts from, is listed as "base". OWNER says who
    has made a layer through the daemon, Docker or containerd, and what a snapshot is called there.

    Example: devmapper ls
    """
    from devmapper.units import human_size

    settings = settings_of(context)
    with opened_graph(settings) as graph:
        found = graph.layers()
    if settings.json:
        show(settings, [_describe(each) for each in found])
        return
    table(
        _COLUMNS,
        [
            [
                each.id,
                *map(human_size, (each.size, each.mapped, each.exclusive, each.shared)),
                _state(each),
                _owner(each),
            ]
            for each in found
        ],
    )


def inspect(context: typer.Context, layer: Layer) -> None:
    """Show all that is known about one layer.

    Example: devmapper --json inspect web1
    """
    settings = settings_of(context)
    check_layer_ids(layer)
    with opened_graph(settings) as graph:
        row, *others = found = graph.inspect(layer)
    details = dict(zip(found._fields[1:], others, strict=True))
    value = {**_describe(row), **details}
    shown = {**value, "owner": _owner(row)}
    del shown["snapshot"]
    rows = [
        (name.replace("_", " ").capitalize(), "-" if item is None else str(item))
        for name, item in shown.items()
    ]
    show(settings, value, pairs(rows))


def check(context: typer.Context) -> None:
    """Compare the records of the layers with the pool.

    It lists layers whose thin device is missing, thin devices that no layer has, and layers whose
    deletion was put off until their last user is gone. Nothing is changed. A layer without a thin
    device can be removed with rm. The metadata themselves are checked by pool check.

    Example: devmapper check
    """
    settings = settings_of(context)
    with opened_graph(settings) as graph:
        found = graph.consistency()
    findings = found.findings()
    value = {
        "consistent": not findings,
        "missing": [{"id": name, "device_id": thin_id} for name, thin_id in found.missing.items()],
        "unknown": list(found.unknown),
        "shared": [{"device_id": n, "ids": list(names)} for n, names in found.shared.items()],
        "put_off": list(found.deleted),
    }
    words = [*findings, *(f"layer {name!r} is deleted when it is free" for name in found.deleted)]
    show(settings, value, "\n".join(words) or "records and pool agree")
    if findings:
        raise PoolMismatch(
            f"records and pool disagree: {len(findings)} findings",
            hint="was the pool restored from a backup, or changed by another program?",
        )


def _describe(row: "LayerRow") -> dict[str, object]:
    owner, snapshot = row.belongs_to
    return {
        "id": row.id,
        "device_id": row.thin_id,
        "size": row.size,
        "mapped": row.mapped,
        "exclusive": row.exclusive,
        "shared": row.shared,
        "active": row.active,
        "mounted": row.mounted,
        "owner": owner or None,
        "snapshot": None if snapshot is None else snapshot._asdict(),
    }


def _state(row: "LayerRow") -> str:
    if row.mounted:
        return "mounted"
    return "active" if row.active else "-"


def _owner(row: "LayerRow") -> str:
    """One line, whatever the key of a snapshot holds."""
    return printable(str(row.belongs_to)) or "-"
