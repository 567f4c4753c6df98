"""Commands about layers as disks: a block device without a mount, or NBD on a socket."""

from typing import Annotated

import typer

from devmapper.cli.arguments import Layer
from devmapper.cli.output import show
from devmapper.cli.settings import check_layer_ids, opened_graph, settings_of
from devmapper.errors import UsageError


def activate(context: typer.Context, layer: Layer) -> None:
    """Make the block device of a layer, and print its path.

    The layer is not mounted. The device is /dev/mapper/NAME or /dev/loopN, and stays until
    deactivate. A virtual machine takes it as a raw disk. Nothing keeps two users from each other:
    do not mount the layer meanwhile.

    Example: devmapper activate vm1
    """
    settings = settings_of(context)
    check_layer_ids(layer)
    with opened_graph(settings) as graph:
        path = graph.activate(layer)
    show(settings, {"id": layer, "path": path}, path)


def deactivate(context: typer.Context, layer: Layer) -> None:
    """Take the block device of a layer away, or end its NBD service.

    One that is in use is busy, and stays. One that is not there is no error.

    Example: devmapper deactivate vm1
    """
    settings = settings_of(context)
    check_layer_ids(layer)
    with opened_graph(settings) as graph:
        done = graph.deactivate(layer)
    show(settings, {"id": layer, "deactivated": done})


def nbd(
    context: typer.Context,
    layer: Layer,
    socket: Annotated[
        str,
        typer.Option(
            "--socket", metavar="PATH", help="The unix socket; chosen by the engine else."
        ),
    ] = "",
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Let clients read only; they cannot write.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the service.")] = False,
) -> None:
    """Serve a layer over NBD on a unix socket, and print its URI.

    For virtual machines where there are no loop devices; QEMU, qemu-img and libnbd take the URI as
    a disk. The socket has mode 0600. A layer that has clients is in use. A snapshot of it is
    consistent as after a loss of power: the file system of a running machine is not frozen.

    Only the embedded engine serves NBD. With the kernel's device mapper a layer has a block device,
    which activate prints.

    Example: devmapper nbd vm1 --socket /run/vm1.sock
    """
    settings = settings_of(context)
    check_layer_ids(layer)
    if stop and (socket or read_only):
        raise UsageError("--stop takes neither --socket nor --read-only")
    with opened_graph(settings) as graph:
        if stop:
            show(settings, {"id": layer, "stopped": graph.stop_nbd(layer)})
            return
        served = graph.serve_nbd(layer, socket, read_only=read_only)
    value = {
        "id": layer,
        "uri": served.uri,
        "socket": served.socket,
        "read_only": served.read_only,
    }
    show(settings, value, served.uri)
