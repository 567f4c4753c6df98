"""The command `devmapper`: its options, its commands, its end."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from devmapper.cli import (
    border,
    config,
    content,
    disks,
    engine,
    layers,
    pool,
    pool_setup,
    serve,
    top,
)
from devmapper.cli.settings import DEFAULT_ROOT, Settings, preference, settings_of
from devmapper.errors import UsageError

_COMPLETION: Final = "_DEVMAPPER_COMPLETE"  # as the scripts of --show-completion set it
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)

app = typer.Typer(
    name=border.PROGRAM,
    rich_markup_mode=None,  # rich would double the time that a command takes to start
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(border.PROGRAM, version("devmapper"))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    root: Annotated[
        str,
        typer.Option(
            "--root", metavar="DIR", envvar="DEVMAPPER_ROOT", help="Directory of the graph."
        ),
    ] = str(DEFAULT_ROOT),
    storage_opt: Annotated[
        list[str] | None,
        typer.Option(
            "--storage-opt",
            metavar="KEY=VALUE",
            envvar="DEVMAPPER_STORAGE_OPT",
            help="An option of the driver, such as dm.basesize=20G; repeatable.",
        ),
    ] = None,
    engine_name: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="NAME",
            envvar="DEVMAPPER_ENGINE",
            help="Who serves the pool: auto, kernel or embedded.",
        ),
    ] = "auto",
    id_map: Annotated[
        list[str] | None,
        typer.Option(
            "--id-map",
            metavar="CONTAINER:HOST:SIZE",
            envvar="DEVMAPPER_ID_MAP",
            help="User and group ids of containers in a user namespace, such as 0:100000:65536;"
            " repeatable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "-v",
            "--verbose",
            count=True,
            help="Say what is done; twice, say more.",
            show_default=False,
        ),
    ] = 0,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Copy-on-write layers for containers, each a thin device in one pool.

    A layer is a snapshot of its parent: made in milliseconds, and only what is written to it takes
    space. The options stand before the command.

    Example: devmapper --root /srv/layers import debian rootfs.tar
    """
    settings = settings_of(context)
    settings.json = as_json
    settings.verbose = verbose
    logging.getLogger("devmapper").setLevel(_LEVELS[min(verbose, len(_LEVELS) - 1)])
    if not root or "\0" in root:
        raise UsageError(f"root {root!r} is not a directory")
    settings.root = Path(root)
    settings.storage_options = storage_opt or []
    settings.engine = preference(engine_name)
    if id_map:
        from devmapper.deviceset.id_maps import parse_id_map

        settings.id_maps = [parse_id_map(text) for text in id_map]


for command in (
    layers.info,
    layers.create,
    layers.get,
    layers.put,
    layers.rm,
    layers.ls,
    layers.inspect,
    layers.exists,
    layers.check,
    top.top,
    disks.activate,
    disks.deactivate,
    disks.nbd,
    content.diff,
    content.changes,
    content.apply,
    serve.serve,
):
    app.command()(command)
app.command("import")(content.import_)
pool.app.command()(pool_setup.create)
pool.app.command()(pool_setup.resize)
app.add_typer(pool.app, name="pool")
app.add_typer(engine.app, name="engine")
app.add_typer(config.app, name="config")


def run(words: list[str]) -> int:
    """Run one command line and return the exit code; nothing is raised."""
    settings = Settings(json="--json" in words)  # until the options have been read
    command = typer.main.get_command(app)

    def invoke() -> int:
        if _COMPLETION in os.environ:
            command.main([], prog_name=border.PROGRAM, complete_var=_COMPLETION)
        # Not Command.main: it takes interrupts and closed pipes for itself
        try:
            with command.make_context(border.PROGRAM, words or ["--help"], obj=settings) as context:
                command.invoke(context)
        except typer.Exit as end:
            return end.exit_code
        return 0

    return border.run(invoke, settings)


def main() -> None:
    """Run the command line of this process and end it."""
    logging.basicConfig(format=f"{border.PROGRAM}: %(levelname)s: %(message)s", stream=sys.stderr)
    border.obey_signals()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
