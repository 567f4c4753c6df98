"""Docker's devicemapper graph driver, on the kernel's device mapper or in user space.

The names of the seed's Go package in Python spelling; each is loaded when it is first used, so
that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from devmapper.deviceset.deviceset import (
        DM_LOG_LEVEL,
        DRIVER_DEFERRED_REMOVAL_SUPPORT,
        ENABLE_DEFERRED_REMOVAL,
        DeviceSet,
    )
    from devmapper.deviceset.devinfo import DevInfo, MetaData
    from devmapper.deviceset.ids import DEVICE_ID_MAP_SZ, MAX_DEVICE_ID
    from devmapper.deviceset.options import (
        DEFAULT_BASE_FS_SIZE,
        DEFAULT_DATA_LOOPBACK_SIZE,
        DEFAULT_META_DATA_LOOPBACK_SIZE,
        DEFAULT_THINP_BLOCK_SIZE,
        DEFAULT_UDEV_SYNC_OVERRIDE,
    )
    from devmapper.deviceset.records import TransactionRecord as Transaction
    from devmapper.deviceset.status import DevStatus, DiskUsage, Status
    from devmapper.driver import Driver, init, mounted, probe_fs_type

_OPTIONS: Final = "devmapper.deviceset.options"
_DEVICESET: Final = "devmapper.deviceset.deviceset"
_STATUS: Final = "devmapper.deviceset.status"
_DRIVER: Final = "devmapper.driver"

_HOMES: Final[dict[str, tuple[str, str]]] = {
    "DEFAULT_BASE_FS_SIZE": (_OPTIONS, "DEFAULT_BASE_FS_SIZE"),
    "DEFAULT_DATA_LOOPBACK_SIZE": (_OPTIONS, "DEFAULT_DATA_LOOPBACK_SIZE"),
    "DEFAULT_META_DATA_LOOPBACK_SIZE": (_OPTIONS, "DEFAULT_META_DATA_LOOPBACK_SIZE"),
    "DEFAULT_THINP_BLOCK_SIZE": (_OPTIONS, "DEFAULT_THINP_BLOCK_SIZE"),
    "DEFAULT_UDEV_SYNC_OVERRIDE": (_OPTIONS, "DEFAULT_UDEV_SYNC_OVERRIDE"),
    "DEVICE_ID_MAP_SZ": ("devmapper.deviceset.ids", "DEVICE_ID_MAP_SZ"),
    "DM_LOG_LEVEL": (_DEVICESET, "DM_LOG_LEVEL"),
    "DRIVER_DEFERRED_REMOVAL_SUPPORT": (_DEVICESET, "DRIVER_DEFERRED_REMOVAL_SUPPORT"),
    "ENABLE_DEFERRED_REMOVAL": (_DEVICESET, "ENABLE_DEFERRED_REMOVAL"),
    "MAX_DEVICE_ID": ("devmapper.deviceset.ids", "MAX_DEVICE_ID"),
    "DevInfo": ("devmapper.deviceset.devinfo", "DevInfo"),
    "DevStatus": (_STATUS, "DevStatus"),
    "DeviceSet": (_DEVICESET, "DeviceSet"),
    "DiskUsage": (_STATUS, "DiskUsage"),
    "Driver": (_DRIVER, "Driver"),
    "MetaData": ("devmapper.deviceset.devinfo", "MetaData"),
    "Status": (_STATUS, "Status"),
    "Transaction": ("devmapper.deviceset.records", "TransactionRecord"),
    "init": (_DRIVER, "init"),
    "mounted": (_DRIVER, "mounted"),
    "probe_fs_type": (_DRIVER, "probe_fs_type"),
}

__all__ = [
    "DEFAULT_BASE_FS_SIZE",
    "DEFAULT_DATA_LOOPBACK_SIZE",
    "DEFAULT_META_DATA_LOOPBACK_SIZE",
    "DEFAULT_THINP_BLOCK_SIZE",
    "DEFAULT_UDEV_SYNC_OVERRIDE",
    "DEVICE_ID_MAP_SZ",
    "DM_LOG_LEVEL",
    "DRIVER_DEFERRED_REMOVAL_SUPPORT",
    "ENABLE_DEFERRED_REMOVAL",
    "MAX_DEVICE_ID",
    "DevInfo",
    "DevStatus",
    "DeviceSet",
    "DiskUsage",
    "Driver",
    "MetaData",
    "Status",
    "Transaction",
    "init",
    "mounted",
    "probe_fs_type",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
