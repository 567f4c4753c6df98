"""Arguments that several commands share, and what a shell completes for them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from devmapper.cli.settings import DEFAULT_ROOT


def complete_layer(context: typer.Context, incomplete: str) -> Iterator[str]:
    """The layers whose ids begin with what was typed; needs neither the pool nor its engine."""
    import os

    from devmapper.deviceset.names import RESERVED
    from devmapper.errors import DevmapperError

    root = context.find_root().params.get("root") or DEFAULT_ROOT
    try:
        names = sorted(os.listdir(Path(root) / "metadata"))
    except (OSError, DevmapperError):
        return
    for name in names:
        if name.startswith(incomplete) and name not in RESERVED and not name.startswith("."):
            yield name


Layer = Annotated[
    str,
    typer.Argument(metavar="ID", help="Id of the layer.", autocompletion=complete_layer),
]
NewLayer = Annotated[str, typer.Argument(metavar="ID", help="Id of the new layer.")]
Layers = Annotated[
    list[str],
    typer.Argument(metavar="ID...", help="Ids of the layers.", autocompletion=complete_layer),
]
Parent = Annotated[
    str,
    typer.Option(
        "--parent",
        metavar="ID",
        help="Id of the parent; without it, the empty base layer.",
        autocompletion=complete_layer,
    ),
]
