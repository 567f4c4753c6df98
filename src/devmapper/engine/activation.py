"""The life of an activated thin device, as a table.

Everything that affects the state of a device goes through `next_state`; the exports of the engine
process execute it, and the conformance suite checks every engine against it.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from devmapper.engine.port import Activation
from devmapper.errors import ThinBusy


class Event(StrEnum):
    """What can happen to a device."""

    ACTIVATE = "activate"
    DEACTIVATE = "deactivate"
    DEFER = "defer"
    CANCEL = "cancel"
    LAST_CLOSE = "last close"
    SUSPEND = "suspend"
    RESUME = "resume"


TRANSITIONS: Final[Mapping[Activation, Mapping[Event, Activation]]] = {
    Activation.ABSENT: {Event.ACTIVATE: Activation.ACTIVE},
    Activation.ACTIVE: {
        Event.SUSPEND: Activation.SUSPENDED,
        Event.DEACTIVATE: Activation.ABSENT,
        Event.DEFER: Activation.LEAVING,
    },
    Activation.SUSPENDED: {Event.RESUME: Activation.ACTIVE},
    Activation.LEAVING: {Event.CANCEL: Activation.ACTIVE, Event.LAST_CLOSE: Activation.ABSENT},
}

_WHY: Final[Mapping[Activation, str]] = {
    Activation.ABSENT: "nothing, it is not active",
    Activation.ACTIVE: "its activation",
    Activation.SUSPENDED: "a suspension",
    Activation.LEAVING: "a deferred removal",
}


def next_state(name: str, state: Activation, event: Event) -> Activation:
    """The state of device *name* after *event*; `ThinBusy` where the table has no such step."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise ThinBusy(name, (_WHY[state],)) from None
