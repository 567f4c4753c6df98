"""The base layer takes a larger size by option: `dm.basesize` of an existing graph.

The layers that exist keep their sizes; those that are made of the base from now on have the new
one.  The record comes first, as in moby (deviceset.go checkGrowBaseDeviceFS), so that no snapshot
of the base is ever smaller than its file system.  Until that has grown, the record has a mark
beside Docker's keys, by which whoever opens the graph next goes on; moby does not.
"""

import logging
from pathlib import Path
from typing import Final

from devmapper.deviceset.busy import deactivate
from devmapper.deviceset.names import BASE, BASE_NAME
from devmapper.deviceset.options import Options
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.session import Session
from devmapper.deviceset.steps import Step
from devmapper.errors import DevmapperError, LayerBusy, ThinBusy, UsageError
from devmapper.linux import blockdev
from devmapper.linux.fs_geometry import geometry
from devmapper.linux.growfs import grow
from devmapper.units import SECTOR_SIZE, Bytes

log = logging.getLogger(__name__)

_OPTION: Final = "dm.basesize"
_MARK: Final = "growing_from"  # a key of the base's record: its size before; Docker skips it


def fills(device: Path) -> bool:
    """Whether the file system on *device* has all of it; one that never grows by us has."""
    try:
        return geometry(device).fills(blockdev.size(device))
    except OSError:
        return True


def grow_base(session: Session, record: LayerRecord, options: Options, *, filled: bool) -> None:
    """Let the base layer, whose record is *record*, have the size that the option names.

    Only where the option was given; a smaller size is `UsageError`.  A growth that was interrupted
    is completed in any case, and also one of moby's, where the option asks for that size again and
    *filled* says that the file system is smaller.  On an error the base has its old size again,
    unless its file system has grown beyond that.
    """
    given = _OPTION in options.given
    wanted = options.base_size if given else record.size
    if wanted < record.size:
        raise UsageError(
            f"{_OPTION}={wanted} is smaller than the base layer, which has {record.size} bytes",
            hint=f"leave it out, or make a new graph; {_OPTION} can only grow",
        )
    old = _size_before(record)
    if wanted == record.size and old is None and (filled or not given):
        return
    before = record._replace(size=record.size if old is None else old, extra=_unmarked(record))
    if wanted != record.size or old is None:
        record = before._replace(size=wanted, extra=(*before.extra, (_MARK, before.size)))
        session.store.save(BASE, record)
        session.checkpoint(Step.BASE_SIZE_RECORDED)
    try:
        _grow_file_system(session, record)
    except (DevmapperError, OSError) as err:
        reverted = _still_fits(session, before)
        if reverted:
            session.store.save(BASE, before)
        if given or not reverted:
            raise
        log.warning("the base layer could not grow and keeps %d bytes: %s", before.size, err)
        return
    session.checkpoint(Step.BASE_GROWN)
    session.store.save(BASE, record._replace(extra=_unmarked(record)))
    session.checkpoint(Step.BASE_GROWTH_RECORDED)
    log.info("the base layer has grown from %d to %d bytes", before.size, wanted)


def _grow_file_system(session: Session, record: LayerRecord) -> None:
    """Durable when it returns."""
    name = session.names.device(BASE)
    try:
        deactivate(session.pool, name, seconds=0)  # it may be active with its old size
    except ThinBusy as err:
        raise LayerBusy(BASE_NAME, err.holders) from err
    device = session.pool.activate(name, record.thin_id, _whole(record.size))
    try:
        grow(device)
    finally:
        deactivate(session.pool, name)
    session.pool.commit()


def _still_fits(session: Session, before: LayerRecord) -> bool:
    """Whether the file system is no larger than the base was; in doubt it is."""
    name = session.names.device(BASE)
    try:
        device = session.pool.activate(name, before.thin_id, _whole(before.size))
        try:
            return geometry(device).size <= before.size
        finally:
            deactivate(session.pool, name)
    except (DevmapperError, OSError):
        return False


def _size_before(record: LayerRecord) -> Bytes | None:
    """The mark of a growth that did not end."""
    value = dict(record.extra).get(_MARK)
    return Bytes(value) if isinstance(value, int) and 0 < value <= record.size else None


def _unmarked(record: LayerRecord) -> tuple[tuple[str, object], ...]:
    return tuple(item for item in record.extra if item[0] != _MARK)


def _whole(size: Bytes) -> Bytes:
    return Bytes(size - size % SECTOR_SIZE)
