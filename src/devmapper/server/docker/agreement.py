"""What Docker asks for at its start, compared with the graph that the daemon has opened.

In Docker's own driver these options made the graph.  Here several clients share one that is open
already: what they ask for must be what it has, and is set in the daemon's configuration.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from devmapper.deviceset.deviceset import DM_LOG_LEVEL, DeviceSet
from devmapper.deviceset.id_maps import IdMap, canonical, container_root, show_maps
from devmapper.deviceset.options import Options, parse_options
from devmapper.driver import Driver
from devmapper.errors import UsageError
from devmapper.server.docker.wire import InitRequest

# Where `Options` keeps what the option of this name says
FIELDS: Final[Mapping[str, str]] = {
    "dm.basesize": "base_size",
    "dm.loopdatasize": "loop_data_size",
    "dm.loopmetadatasize": "loop_metadata_size",
    "dm.fs": "file_system",
    "dm.mkfsarg": "mkfs_arguments",
    "dm.mountopt": "mount_options",
    "dm.datadev": "data_device",
    "dm.metadatadev": "metadata_device",
    "dm.thinpooldev": "thin_pool_device",
    "dm.blkdiscard": "blkdiscard",
    "dm.blocksize": "block_size",
    "dm.override_udev_sync_check": "override_udev_sync_check",
    "dm.use_deferred_removal": "use_deferred_removal",
    "dm.use_deferred_deletion": "use_deferred_deletion",
    "dm.min_free_space": "min_free_space",
    "dm.xfs_nospace_max_retries": "xfs_nospace_max_retries",
    "dm.libdm_log_level": "libdm_log_level",
    "dm.directlvm_device": "directlvm_device",
    "dm.directlvm_device_force": "directlvm_device_force",
    "dm.thinp_percent": "thinp_percent",
    "dm.thinp_metapercent": "thinp_metapercent",
    "dm.thinp_autoextend_percent": "thinp_autoextend_percent",
    "dm.thinp_autoextend_threshold": "thinp_autoextend_threshold",
}


def check_agreement(request: InitRequest, driver: Driver) -> None:
    """`UsageError` for options and maps that are not those of the open graph, or unknown."""
    _check_options(request.opts, _effective(driver.devices))
    container_root(request.uid_maps, request.gid_maps)  # which checks them
    for kind, asked, own in (
        ("user", request.uid_maps, driver.ids.uid_maps),
        ("group", request.gid_maps, driver.ids.gid_maps),
    ):
        present = [IdMap(*each) for each in own]
        if canonical(asked) != canonical(present):
            raise UsageError(
                f"Docker maps its containers' {kind} ids with {show_maps(asked)}, but the daemon"
                f" that holds the graph with {show_maps(present)}",
                hint="give dockerd and the daemon the same id maps: --userns-remap there,"
                " id-maps here",
            )


def _check_options(words: Iterable[str], present: Options) -> None:
    asked = parse_options(words)
    different = sorted(
        name
        for name in asked.given
        if getattr(asked, FIELDS[name]) != getattr(present, FIELDS[name])
    )
    if different:
        raise UsageError(
            f"storage options differ from those of the open graph: {', '.join(different)}",
            hint="set them in the daemon's configuration (storage-opts), not in Docker's",
        )


def _effective(devices: DeviceSet) -> Options:
    """The graph's options with what was chosen where none was given."""
    options = devices.options
    level = options.libdm_log_level
    return replace(
        options,
        blkdiscard=options.discard_on_delete,
        block_size=devices.pool.table().block_size,
        libdm_log_level=DM_LOG_LEVEL if level is None else level,
        override_udev_sync_check=bool(options.override_udev_sync_check),
    )
