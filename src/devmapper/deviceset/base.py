"""The base layer: the empty file system that every other layer descends from."""

import logging
from pathlib import Path

from devmapper.deviceset.base_growth import fills, grow_base
from devmapper.deviceset.busy import deactivate
from devmapper.deviceset.identity import identify
from devmapper.deviceset.names import BASE
from devmapper.deviceset.options import FileSystem, Options
from devmapper.deviceset.records import LayerRecord
from devmapper.deviceset.session import Session
from devmapper.deviceset.steps import Step
from devmapper.errors import PoolMismatch, ThinIdMissing, ToolError
from devmapper.linux import blockdev

log = logging.getLogger(__name__)


def ensure_base(session: Session, options: Options, *, verify: bool) -> None:
    """Make the base layer, or accept the one that is there.

    It is `initialized` only after its file system is durable in the pool; one that is not has been
    interrupted, and is deleted and begun anew.  With *verify* its file system is compared with the
    one that the graph remembers, which shows a graph that was given another graph's pool.
    """
    record = session.store.load(BASE)
    if record is not None and record.initialized and not record.deleted:
        _check_present(session, record)
        filled = _verify(session, record) if verify else True
        _mention_file_system(session, options)
        grow_base(session, record, options, filled=filled)
        return
    if record is not None:
        log.info("the base layer was not finished: starting over")
        deactivate(session.pool, session.names.device(BASE))
        session.delete(BASE, record)
    _create(session, options)


def _create(session: Session, options: Options) -> None:
    record = session.create_thin(BASE, options.base_size)
    name = session.names.device(BASE)
    device = session.pool.activate(name, record.thin_id, record.size)
    try:
        session.checkpoint(Step.BASE_ACTIVATED)
        make_file_system(device, options)
        blockdev.flush(device)
        session.checkpoint(Step.BASE_FORMATTED)
        found = identify(device)
    except Exception:
        deactivate(session.pool, name)
        raise
    deactivate(session.pool, name)
    session.pool.commit()
    session.checkpoint(Step.BASE_DEACTIVATED)
    stored = session.store.load_deviceset()
    session.store.save_deviceset(
        stored._replace(base_uuid=found.uuid, base_file_system=found.fs_type)
    )
    session.checkpoint(Step.BASE_IDENTIFIED)
    session.store.save(BASE, record._replace(initialized=True))
    session.checkpoint(Step.BASE_INITIALIZED)
    log.info("made the base layer: %s of %d bytes", found.fs_type, record.size)


def make_file_system(device: Path, options: Options) -> None:
    """Run mkfs as moby does; each dm.mkfsarg is one argument."""
    from devmapper.linux import process  # a graph is made once, and opened often

    extra = options.mkfs_arguments
    if options.file_system is FileSystem.XFS:
        process.run(["mkfs.xfs", *extra, str(device)])
        return
    try:
        _make_ext4(device, "nodiscard,lazy_itable_init=0,lazy_journal_init=0", extra)
    except ToolError:
        # An old mke2fs does not know lazy_journal_init
        _make_ext4(device, "nodiscard,lazy_itable_init=0", extra)
    process.run(["tune2fs", "-c", "-1", "-i", "0", str(device)])


def _make_ext4(device: Path, extended: str, extra: tuple[str, ...]) -> None:
    from devmapper.linux import process

    process.run(["mkfs.ext4", "-E", extended, *extra, str(device)])


def _check_present(session: Session, record: LayerRecord) -> None:
    try:
        session.pool.thin_status(record.thin_id)
    except ThinIdMissing as err:
        raise PoolMismatch(
            f"the base layer's thin id {record.thin_id} is not in the pool",
            hint="the graph's metadata belong to another pool; nothing was changed",
        ) from err


def _mention_file_system(session: Session, options: Options) -> None:
    """moby ignores dm.fs where there is a base layer, with the same warning."""
    stored = session.store.load_deviceset().base_file_system
    if "dm.fs" in options.given and stored and stored != options.file_system:
        log.warning(
            "dm.fs=%s has no effect: the base layer is there already and has %s",
            options.file_system,
            stored,
        )


def _verify(session: Session, record: LayerRecord) -> bool:
    """Compare the base's UUID; a graph from before Docker 1.8 has none stored yet.

    Whether the file system fills its device.
    """
    name = session.names.device(BASE)
    device = session.pool.activate(name, record.thin_id, record.size)
    try:
        found = identify(device)
        filled = fills(device)
    finally:
        deactivate(session.pool, name)
    stored = session.store.load_deviceset()
    if not stored.base_uuid:
        session.store.save_deviceset(
            stored._replace(base_uuid=found.uuid, base_file_system=found.fs_type)
        )
    elif stored.base_uuid != found.uuid:
        raise PoolMismatch(
            f"UUID of the base file system is {found.uuid}, but the graph has {stored.base_uuid}",
            hint="the graph was given another graph's pool; nothing was changed",
        )
    return filled
