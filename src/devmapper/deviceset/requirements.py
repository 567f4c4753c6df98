"""What an engine can do, against what the options ask of it."""

import logging

from devmapper.deviceset.options import Options
from devmapper.engine.port import EngineFeatures
from devmapper.errors import EnvironmentLacking, UsageError

log = logging.getLogger(__name__)


def check_engine(features: EngineFeatures, options: Options) -> None:
    """Refuse what the engine cannot do; say what has no meaning for it.

    moby 1.7 turned deferred removal off silently where it was missing; its successors refuse.
    """
    if options.thin_pool_device is not None and features.name == "embedded":
        raise UsageError(
            f"pool {options.thin_pool_device!r} (dm.thinpooldev) is one of the kernel's device"
            " mapper, but the embedded engine makes its own pool",
            hint="use dm.datadev and dm.metadatadev, or leave them all out for loop files",
        )
    if options.use_deferred_removal and not features.deferred_removal:
        raise EnvironmentLacking(
            "dm.use_deferred_removal=true: this engine has no deferred removal",
            hint="leave the option out",
        )
    if not features.udev_sync_needed:
        if options.override_udev_sync_check is not None:
            log.info(
                "dm.override_udev_sync_check has no effect: the %s engine has no udev to wait for",
                features.name,
            )
    elif not features.udev_sync and not options.override_udev_sync_check:
        raise EnvironmentLacking(
            "udev sync is not supported by this machine's device mapper",
            hint="start udev, or accept races with dm.override_udev_sync_check=true",
        )
