"""`<home>/setup-config.json`: how the pool of this graph was made of a whole disk.

Docker's file, keys and all (moby `device_setup.go` writeLVMConfig): a number that was not given is
stored as 0 and means the default.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple, Self

from devmapper.deviceset.options import DirectLvm, Options
from devmapper.errors import PoolMismatch, RecordCorrupt
from devmapper.linux.files import save_file

FILE_NAME: Final = "setup-config.json"
VOLUME_GROUP: Final = "docker"
POOL_VOLUME: Final = "thinpool"
POOL_NAME: Final = f"{VOLUME_GROUP}-{POOL_VOLUME}"

_MAX_FILE: Final = 64 * 1024
_POOL_OPTIONS: Final = ("dm.thinpooldev", "dm.datadev", "dm.metadatadev")


class SetupConfig(NamedTuple):
    """`directLVMConfig`; 0 stands for a default."""

    device: str
    thinp_percent: int = 0
    thinp_metapercent: int = 0
    autoextend_percent: int = 0
    autoextend_threshold: int = 0

    @classmethod
    def of(cls, options: Options) -> Self | None:
        """What the options ask for, None if they name no disk."""
        if options.directlvm_device is None:
            return None
        return cls(
            str(options.directlvm_device),
            options.thinp_percent or 0,
            options.thinp_metapercent or 0,
            options.thinp_autoextend_percent or 0,
            options.thinp_autoextend_threshold or 0,
        )

    def effective(self) -> DirectLvm:
        """With the defaults filled in."""
        numbers = dict(zip(DirectLvm._fields[2:], self[1:], strict=True))
        given = {name: value for name, value in numbers.items() if value}
        return DirectLvm(Path(self.device), **given)  # type: ignore[arg-type]


_KEYS: Final = dict(
    zip(
        SetupConfig._fields,
        ("Device", "ThinpPercent", "ThinpMetaPercent", "AutoExtendPercent", "AutoExtendThreshold"),
        strict=True,
    )
)


def load(home: Path) -> SetupConfig | None:
    """What the file says, None without one; `RecordCorrupt` if it is damaged."""
    path = home / FILE_NAME
    try:
        with open(path, "rb") as file:
            members = json.loads(file.read(_MAX_FILE).decode())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as err:
        raise RecordCorrupt(path, f"it is not JSON ({err})") from err
    if not isinstance(members, dict):
        raise RecordCorrupt(path, "it is not a JSON object")
    device = members.get(_KEYS["device"], "")
    if device == "":
        return None  # Docker's empty configuration
    numbers = [members.get(key, 0) for key in list(_KEYS.values())[1:]]
    for value in numbers:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 100:
            raise RecordCorrupt(path, f"{value!r} is not a percentage")
    if not isinstance(device, str):
        raise RecordCorrupt(path, f"{device!r} is not the path of a device")
    return SetupConfig(device, *numbers)


def save(home: Path, config: SetupConfig) -> None:
    """Keep *config*, durably."""
    members = {_KEYS[name]: value for name, value in config._asdict().items()}
    save_file(home / FILE_NAME, json.dumps(members, separators=(",", ":")).encode())


def check_unchanged(stored: SetupConfig, wanted: SetupConfig) -> None:
    """`PoolMismatch` if the options ask for something else than what was made."""
    if stored.effective() == wanted.effective():
        return
    differing = [
        f"{_KEYS[name]} is {old}, but {new} was asked for"
        for name, old, new in zip(
            SetupConfig._fields,
            _numbers(stored.effective()),
            _numbers(wanted.effective()),
            strict=True,
        )
        if old != new
    ]
    raise PoolMismatch(
        f"the graph's pool was made of a disk with other settings: {'; '.join(differing)}",
        hint="give the same dm.directlvm_device and dm.thinp_ options, or leave all of them out",
    )


def with_given_pool(home: Path, options: Options) -> Options:
    """*options* with `dm.thinpooldev` set where the graph's pool was, or is to be, made of a disk.

    Docker does that only while `dm.directlvm_device` is given, and without it makes a new pool of
    loop files beside the old one.
    """
    chosen = any(name in options.given for name in _POOL_OPTIONS)
    if options.directlvm_device is None and (chosen or load(home) is None):
        return options
    return replace(options, thin_pool_device=POOL_NAME)


def _numbers(config: DirectLvm) -> tuple[object, ...]:
    return (str(config.device), *config[2:])
