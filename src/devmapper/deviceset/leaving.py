"""How a client that is a process of its own, such as dockerd, leaves the layers that it uses.

It may end without a word, or be told to let go of everything.  The graph stays open, for it is not
that client's alone.
"""

import logging

from devmapper.deviceset.activation import number_of
from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.names import LayerId, file_name
from devmapper.deviceset.owners import owner_of
from devmapper.deviceset.users import SOMEBODY
from devmapper.errors import LayerBusy, LayerNotFound, LayerNotMounted
from devmapper.linux import holders

log = logging.getLogger(__name__)


def leave(devices: DeviceSet, layer: LayerId, user: str) -> None:
    """*user*, however often counted, does not use the layer any more; without others it goes.

    A use that a process without a name has left behind goes with it.  `LayerBusy` for a mount that
    a process works in; nothing if it is not mounted.
    """
    mounts = devices.parts.mounts
    while (users := mounts.users(layer)).get(user) or users.get(SOMEBODY):
        try:
            devices.unmount_device(layer, user=user)
        except (LayerNotFound, LayerNotMounted):  # somebody else was faster
            return


def leave_all(devices: DeviceSet, user: str) -> None:
    """*user* lets go of all layers; those in use stay, and `LayerBusy` names them."""
    failed: list[LayerBusy] = []
    for layer in devices.parts.mounts.used_by(user):
        try:
            leave(devices, layer, user)
        except LayerBusy as err:
            failed.append(err)
    for other in failed[1:]:
        failed[0].add_note(str(other))
    if failed:
        raise failed[0]


def begin_again(devices: DeviceSet, user: str) -> None:
    """The process that was *user* has ended, and another one takes its place.

    What it has left mounted goes, unless some process uses it: a container that runs on.  That
    counts as one use, which the new process ends when the container does.
    """
    mounts = devices.parts.mounts
    numbers = {}
    for layer in mounts.used_by(user):
        info = mounts.info(layer)
        numbers[layer] = None if info is None else number_of(info)
    in_use = holders.devices_in_use([each for each in numbers.values() if each is not None])
    for layer, number in numbers.items():
        if number in in_use:
            mounts.count_once(layer, user)
            continue
        try:
            leave(devices, layer, user)
        except LayerBusy as err:
            log.warning("%s; it stays mounted", err)


def let_go_of_abandoned(devices: DeviceSet, owner: str) -> None:
    """Unmount and deactivate what a server that was killed amid its work has left of *owner*'s.

    These are the layers that nobody with a name uses: they were mounted for the length of a
    request.  Call it before there are any.
    """
    graph, mounts, _ = devices.parts
    mounts.tidy_users()
    active = {device.name for device in graph.pool.devices()}
    if not active:
        return
    for layer in list(graph.store.layers()):
        if graph.names.device(layer) not in active:
            continue
        record = graph.store.load(layer)
        if record is None or owner_of(record) != owner:
            continue
        if any(name for name, number in mounts.users(layer).items() if number):
            continue
        try:
            devices.unmount_device(layer)
        except (LayerNotFound, LayerNotMounted):
            continue
        except LayerBusy as err:
            log.warning("%s; it stays mounted", err)
        else:
            log.info("let go of layer %r, which a request has left", file_name(layer))
