"""Whether the options of a command line are those that the daemon has the graph open with.

A command that names an option and is served by a daemon without it would do something else than
what was asked for.  Options that a command does not name are the daemon's affair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Final

from devmapper.deviceset.id_maps import IdMap, canonical, container_root, parse_id_map, show_maps
from devmapper.deviceset.options import Options, parse_options
from devmapper.driver import Driver
from devmapper.errors import UsageError
from devmapper.graph.calls import Wishes

_REPEATABLE: Final = {"dm.mkfsarg": "mkfs_arguments", "dm.mountopt": "mount_options"}
_HINT: Final = "leave the option away, or change the daemon's and start it again"


def check_agrees(driver: Driver, wishes: Wishes) -> None:
    """`UsageError` names the first option that differs, or is wrong in itself."""
    devices = driver.devices
    parse_options(wishes.storage_options)
    engine = devices.engine.features().name
    if wishes.engine not in ("auto", engine):
        raise _differs("engine", wishes.engine, engine)
    for name, wanted, own in _differences(wishes.storage_options, devices.options):
        raise _differs(name, wanted, own)
    if wishes.id_maps:
        maps = [parse_id_map(text) for text in wishes.id_maps]
        container_root(maps, maps)  # which checks them
        for own in (driver.ids.uid_maps, driver.ids.gid_maps):
            present = [IdMap(*each) for each in own]
            if canonical(maps) != canonical(present):
                raise _differs("id-map", show_maps(maps), show_maps(present) if present else None)


def _differences(words: Sequence[str], own: Options) -> Iterator[tuple[str, object, object]]:
    """Names of options, what was asked for, what the daemon has."""
    alone = parse_options(words)
    for name, field in _REPEATABLE.items():  # as a whole: each of the words adds to the others
        wanted, given = getattr(alone, field), getattr(own, field)
        if wanted and wanted != given:
            yield name, " ".join(wanted), " ".join(given) or None
    names = {word.partition("=")[0].strip().lower(): word for word in words}  # the last one wins
    for name, word in names.items():
        if name in _REPEATABLE:
            continue
        wanted = replace(parse_options([word], onto=own), given=own.given)
        for each in fields(Options):
            if getattr(wanted, each.name) != getattr(own, each.name):
                yield name, word.partition("=")[2], getattr(own, each.name)


def _differs(name: str, wanted: object, own: object) -> UsageError:
    has = (
        f"has {name} {str(own)!r}, not"
        if own is not None
        else f"was started without {name}, not with"
    )
    return UsageError(f"the daemon that holds the graph {has} {str(wanted)!r}", hint=_HINT)
