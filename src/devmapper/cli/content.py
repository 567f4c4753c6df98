"""Commands about what is in a layer: compare, write out, fill."""

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import typer

from devmapper.cli.arguments import Layer, NewLayer, Parent
from devmapper.cli.output import binary_stdout, new_file, printable, progress, show
from devmapper.cli.settings import check_layer_ids, opened_graph, settings_of
from devmapper.errors import LayerExists, UsageError

if TYPE_CHECKING:
    from devmapper.graph.model import OpenGraph

_STDIN: Final = "-"
_CHUNK: Final = 1 << 18
_LETTERS: Final = "CAD"  # by the numbers of `layerdiff.changes.Kind`; as docker diff prints them
_NAMES: Final = ("modify", "add", "delete")


def diff(
    context: typer.Context,
    layer: Layer,
    parent: Parent = "",
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Write to this file.")
    ] = "",
) -> None:
    """Write what a layer changes as a tar.

    It is compared with the parent that is given; without one the tar holds all of the layer.

    Example: devmapper diff web1 --parent debian | tar t
    """
    settings = settings_of(context)
    check_layer_ids(layer, *filter(None, [parent]))
    if not output:
        out = binary_stdout()
        with opened_graph(settings) as graph:
            _write_diff(graph, layer, parent, out)
            out.flush()
        return
    with opened_graph(settings) as graph, new_file(Path(output)) as file:
        _write_diff(graph, layer, parent, file)
        size = file.tell()
    show(settings, {"id": layer, "parent": parent, "file": output, "size": size})


def changes(context: typer.Context, layer: Layer, parent: Parent = "") -> None:
    """List what a layer changes of its parent.

    Each line is A for added, C for changed or D for deleted, and a path.

    Example: devmapper changes web1 --parent debian
    """
    settings = settings_of(context)
    check_layer_ids(layer, *filter(None, [parent]))
    with opened_graph(settings) as graph:
        found = graph.changes(layer, parent)
    if settings.json:
        show(
            settings,
            [{"path": printable(each.path), "kind": _NAMES[each.kind]} for each in found],
        )
        return
    out = sys.stdout.buffer
    for each in found:
        # A name may be no text, and has to reach a program as it is; a line break would forge one
        path = each.path.replace("\\", "\\\\").replace("\n", "\\n")
        out.write(os.fsencode(f"{_LETTERS[each.kind]} {path}\n"))
    out.flush()


def apply(
    context: typer.Context,
    layer: Layer,
    source: Annotated[
        str, typer.Argument(metavar="[FILE]", help="The tar; - is standard input.")
    ] = _STDIN,
    parent: Parent = "",
) -> None:
    """Unpack a tar of changes into a layer.

    Whiteouts in it delete what they name. It may be compressed with gzip, bzip2, xz or zstd.

    Example: devmapper apply web2 changes.tar
    """
    settings = settings_of(context)
    check_layer_ids(layer, *filter(None, [parent]))
    with (
        _source(source) as stream,
        opened_graph(settings) as graph,
        progress(f"apply {layer}", _size(stream)) as advance,
    ):
        size = graph.apply(layer, parent, stream, progress=advance)
    show(settings, {"id": layer, "size": size})


def import_(
    context: typer.Context,
    layer: NewLayer,
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A tar, a directory, or - for standard input."),
    ],
    parent: Parent = "",
) -> None:
    """Make a layer of a tar or of a directory.

    The tar may be compressed with gzip, bzip2, xz or zstd. If the import fails, the layer is
    removed again. With --id-map owners in the tar or directory are ids of the containers; one
    that no map has is an error.

    Example: devmapper import debian rootfs.tar.zst
    """
    settings = settings_of(context)
    check_layer_ids(layer, *filter(None, [parent]))
    with _filler(source) as fill, opened_graph(settings, create=True) as graph:
        if graph.exists(layer):
            raise LayerExists(layer)
        graph.create(layer, parent)
        with _removed_on_failure(graph, layer):
            size = fill(graph, layer)
    show(settings, {"id": layer, "parent": parent, "size": size})


Fill = Callable[["OpenGraph", str], int]


@contextmanager
def _filler(source: str) -> Iterator[Fill]:
    """How a new layer is filled from *source*, which is opened before a layer is made for it."""
    if source != _STDIN and Path(source).is_dir():
        yield lambda graph, layer: _copy_directory(graph, layer, Path(source))
        return
    with _source(source) as stream:

        def unpack(graph: "OpenGraph", layer: str) -> int:
            with progress(f"import {layer}", _size(stream)) as advance:
                return graph.apply(layer, "", stream, progress=advance)

        yield unpack


def _copy_directory(graph: "OpenGraph", layer: str, source: Path) -> int:
    from devmapper.driver import written_out
    from devmapper.layerdiff.copytree import copy_tree
    from devmapper.layerdiff.ids import Ids

    ids = Ids(*graph.id_maps())  # of whoever holds the graph
    root = Path(graph.get(layer))
    try:
        with written_out(root), progress(f"import {layer}", None) as advance:
            return copy_tree(source, root, progress=advance, ids=ids)
    finally:
        graph.put(layer)


@contextmanager
def _removed_on_failure(graph: "OpenGraph", layer: str) -> Iterator[None]:
    """Leave no half-made layer behind, and say so."""
    try:
        yield
    except BaseException as err:
        try:
            graph.remove(layer)
        except Exception as failure:  # noqa: BLE001 - the first error is the one to tell
            err.add_note(f"the half-made layer {layer!r} could not be removed: {failure}")
        else:
            err.add_note(f"the half-made layer {layer!r} was removed")
        raise


def _write_diff(graph: "OpenGraph", layer: str, parent: str, out: BinaryIO) -> None:
    with progress(f"diff {layer}", None) as advance, graph.diff(layer, parent) as stream:
        while chunk := stream.read(_CHUNK):
            out.write(chunk)
            if advance is not None:
                advance(len(chunk))


@contextmanager
def _source(name: str) -> Iterator[BinaryIO]:
    """The stream that a user named; standard input has to be a pipe or a file."""
    if name != _STDIN:
        with open(name, "rb") as stream:
            yield stream
        return
    if sys.stdin.isatty():
        raise UsageError(
            "an archive is not read from a terminal", hint="name a file, or use a pipe"
        )
    yield sys.stdin.buffer


def _size(stream: BinaryIO) -> int | None:
    """How long a progress bar is: known for files only."""
    found = os.fstat(stream.fileno())
    return found.st_size if stat.S_ISREG(found.st_mode) else None
