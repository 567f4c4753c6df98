"""`devmapper config`: what Docker, containerd and Kubernetes have to be told, and whether it works.

stdout has what belongs into the other side's file, stderr what has to be done besides.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from devmapper.cli.output import show
from devmapper.cli.serve import effective_config
from devmapper.cli.settings import require_root, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmapper.server.config import Config
    from devmapper.server.snippets.snippet import Release, Snippet
    from devmapper.server.snippets.trial import Step

_FAILED: Final = 1

app = typer.Typer(help="Print what others need to use the daemon, try it.")

ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The daemon's file; /etc/devmapper/config.toml by default, if it is there.",
    ),
]
Check = Annotated[bool, typer.Option("--check", help="Try it instead, and say what is missing.")]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the snapshotter: devmapper-serve."),
]
For = Annotated[
    str | None,
    typer.Option(
        "--release", metavar="NUMBER", help="Release to write for, instead of the installed one."
    ),
]


@app.command()
def containerd(
    context: typer.Context,
    config: ConfigFile = None,
    name: Name = None,
    release: For = None,
    check: Check = False,
    file: Annotated[
        str, typer.Option("--file", metavar="FILE", help="containerd's file, which --check reads.")
    ] = "/etc/containerd/config.toml",
) -> None:
    """Print what containerd needs to use the snapshotter.

    With --check the snapshotter is tried, by a scratch snapshot that is written to and removed, and
    containerd's file is looked at; nothing of it is changed.

    Example: devmapper config containerd
    """
    from devmapper.server.snippets import containerd as snippets

    effective = effective_config(context, config, {})
    if check:
        from devmapper.server.snippets import try_containerd

        require_root()
        _report(context, try_containerd.steps(effective, Path(file)))
        return
    found = _release("containerd", release)
    _print(context, snippets.snippet(effective, found, name or snippets.NAME))


@app.command()
def docker(
    context: typer.Context,
    config: ConfigFile = None,
    name: Name = None,
    release: For = None,
    check: Check = False,
    file: Annotated[
        str, typer.Option("--file", metavar="FILE", help="Docker's file, which --check reads.")
    ] = "/etc/docker/daemon.json",
) -> None:
    """Print what Docker needs to use the daemon.

    Docker up to 27 uses its plugin, later ones the snapshotter of containerd. With --check that is
    tried, by a scratch layer that is written to and removed, and Docker's file is looked at.

    Example: devmapper config docker --release 29
    """
    from devmapper.server.snippets import containerd as snapshotter
    from devmapper.server.snippets import docker as snippets

    effective = effective_config(context, config, {})
    found = _release("dockerd", release)
    if check:
        require_root()
        _report(context, _docker_steps(effective, Path(file), found, name))
        return
    _print(context, snippets.snippet(effective, found, name or snapshotter.NAME))


@app.command()
def kubernetes(
    context: typer.Context,
    config: ConfigFile = None,
    image: Annotated[
        str, typer.Option("--image", metavar="IMAGE", help="Image that holds this program.")
    ] = "devmapper:latest",
    check: Check = False,
    file: Annotated[
        str, typer.Option("--file", metavar="FILE", help="containerd's file, which --check reads.")
    ] = "/etc/containerd/config.toml",
) -> None:
    """Print a DaemonSet that runs the daemon on each node.

    Its file is in a ConfigMap beside it. With --check, on a node, the snapshotter is tried and
    whether containerd lets pods run on it.

    Example: devmapper config kubernetes --image registry.example/devmapper:1
    """
    from devmapper.server.snippets import kubernetes as snippets

    effective = effective_config(context, config, {})
    if check:
        from devmapper.server.snippets import try_containerd

        require_root()
        _report(context, try_containerd.steps(effective, Path(file), cri=True))
        return
    _print(context, snippets.snippet(effective, image))


def _docker_steps(
    effective: "Config", file: Path, release: "Release | None", name: str | None
) -> "Iterable[Step]":
    from devmapper.server.snippets import containerd as snapshotter
    from devmapper.server.snippets import docker as snippets
    from devmapper.server.snippets import try_containerd, try_docker

    found = release or snippets.LATEST
    if snippets.takes_plugin(found):
        yield from try_docker.steps(effective, file, found)
        return
    yield from try_containerd.steps(effective, snapshotter.FILE)
    wanted = snippets.members(effective, found, name or snapshotter.NAME)
    yield try_docker.docker_is_told(file, wanted)


def _release(program: str, wanted: str | None) -> "Release | None":
    from devmapper.server.snippets.snippet import installed_release, parse_release

    return parse_release(wanted) if wanted is not None else installed_release(program)


def _print(context: typer.Context, snippet: "Snippet") -> None:
    settings = settings_of(context)
    value = {"file": str(snippet.file), "text": snippet.text, "notes": snippet.notes}
    show(settings, value, snippet.text.removesuffix("\n"))
    if not settings.json:
        sys.stdout.flush()
        for note in snippet.notes:
            print(f"note: {note}", file=sys.stderr)


def _report(context: typer.Context, steps: "Iterable[Step]") -> None:
    """Say of each step how it went, as it goes; the command fails if one does."""
    settings = settings_of(context)
    done = []
    for step in steps:
        done.append(step)
        if not settings.json:
            hint = "" if step.ok or not step.hint else f"\n        {step.hint}"
            print(f"{'ok' if step.ok else 'failed':<6}  {step.what}: {step.told}{hint}", flush=True)
    value = {"ok": all(step.ok for step in done), "steps": [step._asdict() for step in done]}
    show(settings, value)
    if not value["ok"]:
        raise typer.Exit(_FAILED)
