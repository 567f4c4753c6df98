"""The storage options, `dm.<name>=<value>`, as moby `deviceset.go` NewDeviceSet reads them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.errors import UsageError
from devmapper.units import GIB, MAX_METADATA_SIZE, Bytes, data_block_size, parse_size

DEFAULT_DATA_LOOPBACK_SIZE: Final = Bytes(100 * GIB)
DEFAULT_META_DATA_LOOPBACK_SIZE: Final = Bytes(2 * GIB)
DEFAULT_BASE_FS_SIZE: Final = Bytes(10 * GIB)
DEFAULT_THINP_BLOCK_SIZE: Final = 128  # sectors: 64 KiB
DEFAULT_UDEV_SYNC_OVERRIDE: Final = False

_MAX_METADATA_DEVICE: Final = 16 * GIB
_MIN_METADATA_DEVICE: Final = 64 * 1024


class FileSystem(StrEnum):
    """Kinds of file system that a base layer can have."""

    EXT4 = "ext4"
    XFS = "xfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user chose; None where the choice is left to us."""

    base_size: Bytes = DEFAULT_BASE_FS_SIZE
    loop_data_size: Bytes = DEFAULT_DATA_LOOPBACK_SIZE
    loop_metadata_size: Bytes = DEFAULT_META_DATA_LOOPBACK_SIZE
    file_system: FileSystem = FileSystem.EXT4
    mkfs_arguments: tuple[str, ...] = ()
    mount_options: tuple[str, ...] = ()
    data_device: Path | None = None
    metadata_device: Path | None = None
    thin_pool_device: str | None = None
    blkdiscard: bool | None = None
    block_size: Bytes | None = None
    override_udev_sync_check: bool | None = None
    use_deferred_removal: bool = False
    given: frozenset[str] = field(default=frozenset())

    @property
    def discard_on_delete(self) -> bool:
        """By default only where the data device is a loop file, which gets its holes back."""
        if self.blkdiscard is not None:
            return self.blkdiscard
        return self.data_device is None and self.thin_pool_device is None


class _Setting(NamedTuple):
    name: str
    value: str

    def wrong(self, expected: str) -> UsageError:
        return UsageError(f"option {self.name}={self.value}: expected {expected}")


# The words that Go's strconv.ParseBool takes
_BOOLS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}


def parse_options(words: Iterable[str]) -> Options:
    """Read `key=value` words in order; later ones win, and repeatable ones add up.

    Keys are trimmed and lower-cased.  `UsageError` names the option, its value and what was
    expected.
    """
    options = Options()
    for word in words:
        key, separator, value = word.partition("=")
        name = key.strip().lower()
        if not separator:
            raise UsageError(
                f"storage option {word!r} has no value: expected key=value",
                hint="for example dm.basesize=20G",
            )
        if name in _LATER:
            raise UsageError(
                f"storage option {name!r} is not supported yet by this version",
                hint="leave it out",
            )
        apply = _APPLY.get(name)
        if apply is None:
            raise UsageError(
                f"storage option {name!r} is unknown", hint=f"known are: {', '.join(_APPLY)}"
            )
        options = apply(options, _Setting(name, value))
        options = replace(options, given=options.given | {name})
    return options


def _size(setting: _Setting) -> Bytes:
    try:
        value = parse_size(setting.value)
    except UsageError as err:
        raise setting.wrong("a size such as 10G or 512M") from err
    if value == 0:
        raise setting.wrong("a size larger than 0")
    return value


def _bool(setting: _Setting) -> bool:
    try:
        return _BOOLS[setting.value]
    except KeyError:
        raise setting.wrong("true or false") from None


def _path(setting: _Setting) -> Path:
    if not setting.value or "\0" in setting.value:
        raise setting.wrong("the path of a block device")
    return Path(setting.value)


def _base_size(options: Options, setting: _Setting) -> Options:
    return replace(options, base_size=_size(setting))


def _loop_data_size(options: Options, setting: _Setting) -> Options:
    return replace(options, loop_data_size=_size(setting))


def _loop_metadata_size(options: Options, setting: _Setting) -> Options:
    value = _size(setting)
    if not _MIN_METADATA_DEVICE <= value <= _MAX_METADATA_DEVICE:
        raise setting.wrong(
            f"a size from 64K to 16G (the format addresses {MAX_METADATA_SIZE} bytes)"
        )
    return replace(options, loop_metadata_size=value)


def _file_system(options: Options, setting: _Setting) -> Options:
    try:
        return replace(options, file_system=FileSystem(setting.value))
    except ValueError:
        raise setting.wrong("ext4 or xfs") from None


def _mkfs_argument(options: Options, setting: _Setting) -> Options:
    if "\0" in setting.value:
        raise setting.wrong("an argument for mkfs")
    return replace(options, mkfs_arguments=(*options.mkfs_arguments, setting.value))


def _mount_option(options: Options, setting: _Setting) -> Options:
    if "\0" in setting.value:
        raise setting.wrong("mount options")
    return replace(options, mount_options=(*options.mount_options, setting.value))


def _data_device(options: Options, setting: _Setting) -> Options:
    return replace(options, data_device=_path(setting))


def _metadata_device(options: Options, setting: _Setting) -> Options:
    return replace(options, metadata_device=_path(setting))


def _thin_pool_device(options: Options, setting: _Setting) -> Options:
    name = setting.value.removeprefix("/dev/mapper/")
    if not name or "/" in name or "\0" in name:
        raise setting.wrong("the name of a thin pool or /dev/mapper/<name>")
    return replace(options, thin_pool_device=name)


def _blkdiscard(options: Options, setting: _Setting) -> Options:
    return replace(options, blkdiscard=_bool(setting))


def _block_size(options: Options, setting: _Setting) -> Options:
    try:
        return replace(options, block_size=data_block_size(_size(setting)))
    except UsageError as err:
        raise setting.wrong("64K to 1G in multiples of 64K") from err


def _override_udev_sync_check(options: Options, setting: _Setting) -> Options:
    return replace(options, override_udev_sync_check=_bool(setting))


def _use_deferred_removal(options: Options, setting: _Setting) -> Options:
    return replace(options, use_deferred_removal=_bool(setting))


_APPLY: Final[Mapping[str, Callable[[Options, _Setting], Options]]] = {
    "dm.basesize": _base_size,
    "dm.loopdatasize": _loop_data_size,
    "dm.loopmetadatasize": _loop_metadata_size,
    "dm.fs": _file_system,
    "dm.mkfsarg": _mkfs_argument,
    "dm.mountopt": _mount_option,
    "dm.datadev": _data_device,
    "dm.metadatadev": _metadata_device,
    "dm.thinpooldev": _thin_pool_device,
    "dm.blkdiscard": _blkdiscard,
    "dm.blocksize": _block_size,
    "dm.override_udev_sync_check": _override_udev_sync_check,
    "dm.use_deferred_removal": _use_deferred_removal,
}
OPTION_NAMES: Final = tuple(_APPLY)

# Options that Docker added after 1.7
_LATER: Final = frozenset(
    {
        "dm.use_deferred_deletion",
        "dm.min_free_space",
        "dm.xfs_nospace_max_retries",
        "dm.libdm_log_level",
        "dm.directlvm_device",
        "dm.directlvm_device_force",
        "dm.thinp_percent",
        "dm.thinp_metapercent",
        "dm.thinp_autoextend_percent",
        "dm.thinp_autoextend_threshold",
    }
)
