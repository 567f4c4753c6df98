"""Commands about the pool: how full it is, whether it is sound, what is in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from devmapper.cli.output import new_file, pairs, progress, show
from devmapper.cli.settings import (
    Settings,
    at_daemon,
    opened_graph,
    own_pool,
    preference,
    require_graph,
    require_no_daemon,
    require_root,
    settings_of,
)
from devmapper.errors import IntegrityError, PoolNotFound

if TYPE_CHECKING:
    from devmapper.deviceset.status import DiskUsage
    from devmapper.thin.damage import CheckReport, Damage

app = typer.Typer(help="Make, look at, check, dump, enlarge the pool.")

MetadataFile = Annotated[
    str,
    typer.Argument(
        metavar="[METADATA_FILE]",
        help="Metadata of a pool that is not in use; without it, those of the graph's own pool.",
    ),
]


@app.command()
def status(context: typer.Context) -> None:
    """Show how full the pool is.

    Example: devmapper pool status
    """
    from devmapper.units import human_size

    settings = settings_of(context)
    with opened_graph(settings) as graph:
        found = graph.pool()
    value = {
        **found._asdict(),
        "data": describe_usage(found.data),
        "metadata": describe_usage(found.metadata),
    }
    rows = [
        ("Pool Name", found.name),
        ("Engine", found.engine),
        ("Mode", f"{found.mode}{', needs_check' if found.needs_check else ''}"),
        ("Transaction Id", str(found.transaction_id)),
        ("Block Size", human_size(found.block_size)),
        ("Data Space", _words(found.data)),
        ("Metadata Space", _words(found.metadata)),
        ("Data file", found.data_file),
        ("Metadata file", found.metadata_file),
    ]
    if found.data_file_allocated is not None:
        rows.append(("Data file takes on disk", human_size(found.data_file_allocated)))
    show(settings, value, pairs(rows))


@app.command()
def check(
    context: typer.Context,
    metadata_file: MetadataFile = "",
    clear_needs_check: Annotated[
        bool,
        typer.Option(
            "--clear-needs-check",
            help="If there is no damage, let a pool that asks for a check take writes again.",
        ),
    ] = False,
) -> None:
    """Check pool metadata and list all damage.

    Nothing is changed, unless --clear-needs-check is given, for which the engine has to be stopped.
    With METADATA_FILE neither root nor an engine is needed. The pool of a running engine is checked
    in the state of its last commit.

    Example: devmapper pool check /var/lib/devmapper/devicemapper/metadata
    """
    from devmapper.thin.blocks import FileDevice
    from devmapper.thin.check import check as check_metadata

    settings = settings_of(context)
    if clear_needs_check and not metadata_file:
        require_no_daemon(settings)
    with (
        _metadata(settings, metadata_file) as (path, name),
        FileDevice.open(path, read_only=True) as device,
        progress("check", device.nr_blocks, is_bytes=False) as advance,
    ):
        done = 0

        def advanced(read: int, _total: int) -> None:
            nonlocal done
            if advance is not None:
                advance(read - done)
            done = read

        report = check_metadata(device, progress=advanced)
    cleared = report.clean and clear_needs_check and _clear(Path(name))
    words = _in_words(report, name) + ("\nneeds_check is cleared" if cleared else "")
    show(settings, {**_describe(report, name), "cleared_needs_check": cleared}, words)
    if not report.clean:
        raise IntegrityError(
            f"metadata {name!r} have damage: {len(report.damages)} findings",
            hint="stop the engine and keep a copy of the file; thin_repair may rebuild it",
        )


@app.command()
def dump(
    context: typer.Context,
    metadata_file: MetadataFile = "",
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Write to this file.")
    ] = "",
) -> None:
    """Print pool metadata as XML.

    The format is that of thin_dump, and thin_restore reads it. With METADATA_FILE neither root nor
    an engine is needed.

    Example: devmapper pool dump -o pool.xml
    """
    import sys

    from devmapper.thin.blocks import FileDevice
    from devmapper.thin.dump import dump as dump_metadata

    settings = settings_of(context)
    with (
        _metadata(settings, metadata_file) as (path, _),
        FileDevice.open(path, read_only=True) as device,
    ):
        if not output:
            sys.stdout.writelines(dump_metadata(device))
            return
        with new_file(Path(output)) as file:
            file.writelines(piece.encode("ascii") for piece in dump_metadata(device))


@contextmanager
def _metadata(settings: Settings, file: str) -> Iterator[tuple[Path, str]]:
    """Metadata that nobody writes to meanwhile, and what they are called.

    Those of the graph's own pool are copied if an engine holds it: while it works, the blocks of
    the file belong to different transactions.
    """
    if file:
        yield Path(file), file
        return
    require_root()
    require_graph(settings)
    import tempfile

    from devmapper.engine.select import choose_engine

    options, name = own_pool(settings)
    own = options.metadata_device or settings.root / "devicemapper" / "metadata"
    engine = settings.engine
    remote = at_daemon(settings)
    if remote is not None:
        found = remote.engine()
        engine, name = preference(found.engine), found.pool
    pool = choose_engine(engine).find_pool(name)
    if pool is None:
        if options.thin_pool_device is not None:
            raise PoolNotFound(f"thin pool {name!r} is not active", hint="activate it first")
        yield own, str(own)
        return
    own = pool.table().metadata_device
    with tempfile.TemporaryDirectory(prefix="devmapper-") as directory:
        copy = Path(directory) / "metadata"
        pool.export_metadata(copy)
        yield copy, str(own)


def _clear(metadata: Path) -> bool:
    """Whether needs_check was set, and is not any more."""
    from devmapper.engine.embedded.needs_check import clear_needs_check
    from devmapper.engine.port import Outcome

    return clear_needs_check(metadata) is Outcome.DONE


def describe_usage(usage: "DiskUsage") -> dict[str, int]:
    return {"used": usage.used, "total": usage.total, "available": usage.available}


def _words(usage: "DiskUsage") -> str:
    from devmapper.units import human_size

    return (
        f"{human_size(usage.used)} used of {human_size(usage.total)},"
        f" {human_size(usage.available)} available"
    )


def _describe(report: "CheckReport", name: str) -> dict[str, object]:
    return {
        "metadata": name,
        "clean": report.clean,
        "needs_check": report.needs_check,
        "leaked_data_blocks": report.leaked_data_blocks,
        "leaked_metadata_blocks": report.leaked_metadata_blocks,
        "damages": [_describe_damage(damage) for damage in report.damages],
        "notes": [_describe_damage(note) for note in report.notes],
    }


def _describe_damage(damage: "Damage") -> dict[str, object]:
    return {
        "kind": str(damage.kind),
        "space": damage.space,
        "block": damage.block,
        "nr_blocks": damage.nr_blocks,
        "thin_ids": list(damage.thin_ids),
        "message": str(damage),
    }


def _in_words(report: "CheckReport", name: str) -> str:
    lines = [str(damage) for damage in report.damages]
    lines += [f"note: {note}" for note in report.notes]
    if report.needs_check:
        lines.append("the pool asks for a check (needs_check)")
    if report.clean:
        lines.append(f"{name}: no damage")
    return "\n".join(lines)
