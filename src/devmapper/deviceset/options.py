"""The storage options, `dm.<name>=<value>`, as moby `deviceset.go` NewDeviceSet reads them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.errors import UsageError
from devmapper.units import (
    GIB,
    MAX_METADATA_DEVICE,
    MAX_METADATA_SIZE,
    Bytes,
    data_block_size,
    parse_size,
)

DEFAULT_DATA_LOOPBACK_SIZE: Final = Bytes(100 * GIB)
DEFAULT_META_DATA_LOOPBACK_SIZE: Final = Bytes(2 * GIB)
DEFAULT_BASE_FS_SIZE: Final = Bytes(10 * GIB)
DEFAULT_THINP_BLOCK_SIZE: Final = 128  # sectors: 64 KiB
DEFAULT_UDEV_SYNC_OVERRIDE: Final = False
DEFAULT_MIN_FREE_SPACE: Final = 10  # percent
DEFAULT_THINP_PERCENT: Final = 95
DEFAULT_THINP_METAPERCENT: Final = 1
DEFAULT_THINP_AUTOEXTEND_PERCENT: Final = 20
DEFAULT_THINP_AUTOEXTEND_THRESHOLD: Final = 80

_MIN_METADATA_DEVICE: Final = 64 * 1024


class FileSystem(StrEnum):
    """Kinds of file system that a base layer can have."""

    EXT4 = "ext4"
    XFS = "xfs"


class DirectLvm(NamedTuple):
    """How a whole disk becomes a thin pool (moby `device_setup.go` directLVMConfig)."""

    device: Path
    force: bool = False  # also where the disk holds a file system
    thinp_percent: int = DEFAULT_THINP_PERCENT  # of the volume group, as the next one
    thinp_metapercent: int = DEFAULT_THINP_METAPERCENT
    autoextend_percent: int = DEFAULT_THINP_AUTOEXTEND_PERCENT
    autoextend_threshold: int = DEFAULT_THINP_AUTOEXTEND_THRESHOLD


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
    use_deferred_deletion: bool = False
    min_free_space: int = DEFAULT_MIN_FREE_SPACE  # percent of data and of metadata
    xfs_nospace_max_retries: int | None = None
    libdm_log_level: int | None = None
    directlvm_device: Path | None = None
    directlvm_device_force: bool = False
    thinp_percent: int | None = None
    thinp_metapercent: int | None = None
    thinp_autoextend_percent: int | None = None
    thinp_autoextend_threshold: int | None = None
    given: frozenset[str] = field(default=frozenset())

    @property
    def discard_on_delete(self) -> bool:
        """By default only where the data device is a loop file, which gets its holes back."""
        if self.blkdiscard is not None:
            return self.blkdiscard
        return (
            self.data_device is None
            and self.thin_pool_device is None
            and self.directlvm_device is None
        )

    @property
    def direct_lvm(self) -> DirectLvm | None:
        """The disk to make a pool of, with moby's defaults filled in; None without one."""
        if self.directlvm_device is None:
            return None
        chosen = {
            "thinp_percent": self.thinp_percent,
            "thinp_metapercent": self.thinp_metapercent,
            "autoextend_percent": self.thinp_autoextend_percent,
            "autoextend_threshold": self.thinp_autoextend_threshold,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        return DirectLvm(self.directlvm_device, self.directlvm_device_force, **given)


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


def parse_options(words: Iterable[str], *, onto: Options | None = None) -> Options:
    """Read `key=value` words in order; later ones win, and repeatable ones add up.

    Keys are trimmed and lower-cased.  What is not given is as in *onto*, or left to us.
    `UsageError` names the option, its value and what was expected.
    """
    options = onto or Options()
    for word in words:
        key, separator, value = word.partition("=")
        name = key.strip().lower()
        if not separator:
            raise UsageError(
                f"storage option {word!r} has no value: expected key=value",
                hint="for example dm.basesize=20G",
            )
        apply = _APPLY.get(name)
        if apply is None:
            raise UsageError(
                f"storage option {name!r} is unknown", hint=f"known are: {', '.join(_APPLY)}"
            )
        options = apply(options, _Setting(name, value))
        options = replace(options, given=options.given | {name})
    _check_combination(options)
    return options


def _check_combination(options: Options) -> None:
    """Refuse options that contradict each other, as moby does at its start."""
    if options.use_deferred_deletion and not options.use_deferred_removal:
        raise UsageError(
            "dm.use_deferred_deletion=true needs dm.use_deferred_removal=true",
            hint="give both, or neither",
        )
    if options.directlvm_device is not None:
        other = next(
            (
                name
                for name in ("dm.thinpooldev", "dm.datadev", "dm.metadatadev")
                if name in options.given
            ),
            None,
        )
        if other is not None:
            raise UsageError(f"dm.directlvm_device and {other} exclude each other")
    if (options.thinp_percent is None) != (options.thinp_metapercent is None):
        raise UsageError("dm.thinp_percent and dm.thinp_metapercent need each other")
    if options.thinp_percent is not None and options.thinp_metapercent is not None:
        total = options.thinp_percent + options.thinp_metapercent
        if total > 100:
            raise UsageError(
                f"dm.thinp_percent and dm.thinp_metapercent are {total}% together,"
                " expected at most 100%"
            )


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
    if not _MIN_METADATA_DEVICE <= value <= MAX_METADATA_DEVICE:
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


def _use_deferred_deletion(options: Options, setting: _Setting) -> Options:
    return replace(options, use_deferred_deletion=_bool(setting))


def _number(setting: _Setting, digits: str, lowest: int, highest: int) -> int:
    """A whole number in decimal digits, and no others than these (no sign, no blank)."""
    if not (digits.isascii() and digits.isdigit()) or not lowest <= int(digits) <= highest:
        raise setting.wrong(f"a whole number from {lowest} to {highest}")
    return int(digits)


def _percent(setting: _Setting, highest: int) -> int:
    return _number(setting, setting.value.removesuffix("%"), 0, highest)


def _min_free_space(options: Options, setting: _Setting) -> Options:
    if not setting.value.endswith("%"):
        raise setting.wrong("a percentage such as 10%")
    return replace(options, min_free_space=_percent(setting, 99))


def _xfs_nospace_max_retries(options: Options, setting: _Setting) -> Options:
    value = _number(setting, setting.value, 0, 2**31 - 1)  # what the kernel's int takes
    return replace(options, xfs_nospace_max_retries=value)


def _libdm_log_level(options: Options, setting: _Setting) -> Options:
    return replace(options, libdm_log_level=_number(setting, setting.value, 2, 7))


def _directlvm_device(options: Options, setting: _Setting) -> Options:
    return replace(options, directlvm_device=_path(setting))


def _directlvm_device_force(options: Options, setting: _Setting) -> Options:
    return replace(options, directlvm_device_force=_bool(setting))


def _thinp_percent(options: Options, setting: _Setting) -> Options:
    return replace(options, thinp_percent=_percent(setting, 99))


def _thinp_metapercent(options: Options, setting: _Setting) -> Options:
    return replace(options, thinp_metapercent=_percent(setting, 99))


def _thinp_autoextend_percent(options: Options, setting: _Setting) -> Options:
    return replace(options, thinp_autoextend_percent=_percent(setting, 100))


def _thinp_autoextend_threshold(options: Options, setting: _Setting) -> Options:
    return replace(options, thinp_autoextend_threshold=_percent(setting, 100))


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
    "dm.use_deferred_deletion": _use_deferred_deletion,
    "dm.min_free_space": _min_free_space,
    "dm.xfs_nospace_max_retries": _xfs_nospace_max_retries,
    "dm.libdm_log_level": _libdm_log_level,
    "dm.directlvm_device": _directlvm_device,
    "dm.directlvm_device_force": _directlvm_device_force,
    "dm.thinp_percent": _thinp_percent,
    "dm.thinp_metapercent": _thinp_metapercent,
    "dm.thinp_autoextend_percent": _thinp_autoextend_percent,
    "dm.thinp_autoextend_threshold": _thinp_autoextend_threshold,
}
OPTION_NAMES: Final = tuple(_APPLY)
