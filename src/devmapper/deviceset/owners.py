"""Whom a layer belongs to: a member of its record that Docker does not know and leaves alone."""

from typing import Final

from devmapper.deviceset.records import Extra, LayerRecord

OWNER: Final = "owner"
DOCKER: Final = "docker"
CONTAINERD: Final = "containerd"


def owned_by(owner: str) -> Extra:
    """What the record of a layer holds that *owner* has made."""
    return ((OWNER, owner),)


def owner_of(record: LayerRecord) -> str:
    """Who made the layer through one of our front ends; "" for everybody else."""
    found = dict(record.extra).get(OWNER)
    return found if isinstance(found, str) else ""
