"""What the daemon is told: a TOML file and the options of `devmapper serve`, which win.

One table of keys says what each is called, what it takes and how it is shown, so that the file, the
command line and `--print-config` cannot disagree.  Nothing here is opened but the file.
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from devmapper.deviceset.id_maps import IdMap, container_root, parse_id_map
from devmapper.deviceset.options import parse_options
from devmapper.errors import UsageError
from devmapper.server.address import Address, TcpAddress, parse_address, show_address
from devmapper.server.sockets import check_path

if TYPE_CHECKING:
    from devmapper.engine.select import Preference

DEFAULT_FILE: Final = Path("/etc/devmapper/config.toml")
_MAX_FILE: Final = 1 << 20
_METRICS: Final = TcpAddress("127.0.0.1", 9273)
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)", re.ASCII)
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST: Final = 86_400.0
_MOST: Final = 1_000_000

Tree: TypeAlias = Mapping[str, object]  # as tomllib makes it: keys and tables


class OnStop(StrEnum):
    """What becomes of the pool when the daemon is told to end."""

    KEEP = "keep"  # it stays active, and mounted what is mounted
    RELEASE = "release"  # all is unmounted and let go


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    AUTO = "auto"  # the journal's where stderr is the journal
    JOURNAL = "journal"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it, with defaults; the names are those of the keys, `docker.socket` and so on."""

    root: Path = Path("/var/lib/devmapper")
    engine: "Preference" = "auto"
    storage_opts: tuple[str, ...] = ()
    id_maps: tuple[IdMap, ...] = ()
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.AUTO
    on_stop: OnStop = OnStop.KEEP
    stop_time: float = 30.0  # seconds
    control_socket: Path | None = None  # None: made of the graph, see `lock.control_socket`
    docker_enabled: bool = False
    docker_socket: Path = Path("/run/docker/plugins/devmapper.sock")
    containerd_enabled: bool = False
    containerd_socket: Path = Path("/run/devmapper/containerd.sock")
    metrics_enabled: bool = False
    metrics_address: Address = _METRICS
    metrics_max_layers: int = 1000
    metrics_layers_interval: float = 60.0  # seconds
    watch_enabled: bool = True
    watch_interval: float = 10.0  # seconds
    watch_data_low_water: float = 10.0  # percent that should be free; 0 never warns
    watch_metadata_low_water: float = 10.0


class _WrongValueError(ValueError):
    """What was found is not what the key takes."""


class Key(NamedTuple):
    """One key of the file."""

    name: str  # "docker.socket"
    read: Callable[[object], object]
    expected: str
    meaning: str
    show: Callable[[Any], object] = lambda value: value

    @property
    def table(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        return re.sub(r"[.-]", "_", self.name)

    @property
    def option(self) -> str:
        """The option of `devmapper serve` that is the same."""
        if self.name in ("storage-opts", "id-maps"):  # they stand for one value each
            return f"--{self.name[:-1]}"
        return "--" + self.name.removesuffix(".enabled").replace(".", "-")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _WrongValueError
    if any("\ud800" <= char <= "\udfff" for char in value):  # bytes that no TOML can hold
        raise _WrongValueError
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongValueError
    return value


def _directory(value: object) -> Path:
    path = Path(_text(value))
    if not path.is_absolute():
        raise _WrongValueError
    return path


def _socket(value: object) -> Path:
    path = Path(_text(value))
    check_path(path)
    return path


def _address(value: object) -> Address:
    return parse_address(_text(value))


def _texts(value: object) -> list[str]:
    if not isinstance(value, list):
        raise _WrongValueError
    return [_text(each) for each in value]


def _storage_opts(value: object) -> tuple[str, ...]:
    words = _texts(value)
    parse_options(words)
    return tuple(words)


def _id_maps(value: object) -> tuple[IdMap, ...]:
    maps = tuple(map(parse_id_map, _texts(value)))
    container_root(maps, maps)
    return maps


def _engine(value: object) -> str:
    if value not in ("auto", "kernel", "embedded"):
        raise _WrongValueError
    return str(value)


def _one_of(words: type[StrEnum]) -> Callable[[object], StrEnum]:
    def read(value: object) -> StrEnum:
        try:
            return words(_text(value))
        except ValueError:
            raise _WrongValueError from None

    return read


def _duration(value: object) -> float:
    found = _DURATION.fullmatch(_text(value))
    if found is None:
        raise _WrongValueError
    seconds = float(found[1]) * _SECONDS[found[2]]
    if seconds > _LONGEST:
        raise _WrongValueError
    return seconds


def _interval(value: object) -> float:
    seconds = _duration(value)
    if seconds <= 0:
        raise _WrongValueError
    return seconds


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise _WrongValueError
    return value


def _percent(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise _WrongValueError
    return float(value)


def _show_duration(seconds: float) -> str:
    return f"{seconds:g}s" if seconds >= 1 else f"{seconds * 1000:g}ms"


_SOCKET: Final = "the absolute path of a socket"
_FLAG: Final = "true or false"
_TIME: Final = "a time such as 30s, at most a day"
KEYS: Final = (
    Key("root", _directory, "an absolute path", "Directory of the graph.", str),
    Key("engine", _engine, "auto, kernel or embedded", "Who serves the pool."),
    Key(
        "storage-opts",
        _storage_opts,
        "a list of storage options such as dm.basesize=20G",
        "Options of the driver.",
        list,
    ),
    Key(
        "id-maps",
        _id_maps,
        "a list of maps such as 0:100000:65536",
        "User and group ids of containers in a user namespace.",
        lambda maps: [str(each) for each in maps],
    ),
    Key("log-level", _one_of(LogLevel), "debug, info, warning or error", "What is logged.", str),
    Key(
        "log-format",
        _one_of(LogFormat),
        "auto, journal or text",
        "How: with priorities for the journal, or with times.",
        str,
    ),
    Key(
        "on-stop",
        _one_of(OnStop),
        "keep or release",
        "What becomes of the pool and the mounts when the daemon ends.",
        str,
    ),
    Key(
        "stop-time",
        _duration,
        _TIME,
        "How long requests under way are waited for when the daemon ends.",
        _show_duration,
    ),
    Key("control.socket", _socket, _SOCKET, "Where our own commands ask.", str),
    Key("docker.enabled", _flag, _FLAG, "Whether the plugin of Docker is served."),
    Key("docker.socket", _socket, _SOCKET, "The plugin's socket; its name is the driver's.", str),
    Key("containerd.enabled", _flag, _FLAG, "Whether the snapshotter of containerd is served."),
    Key("containerd.socket", _socket, _SOCKET, "The snapshotter's socket.", str),
    Key("metrics.enabled", _flag, _FLAG, "Whether metrics are served."),
    Key(
        "metrics.address",
        _address,
        "an address such as 127.0.0.1:9273 or unix:/run/metrics.sock",
        "Where Prometheus asks.",
        show_address,
    ),
    Key(
        "metrics.max-layers",
        _number,
        "a whole number from 0 to 1000000",
        "How many layers have series of their own.",
    ),
    Key(
        "metrics.layers-interval",
        _duration,
        _TIME,
        "How old the layers' sizes may be.",
        _show_duration,
    ),
    Key("watch.enabled", _flag, _FLAG, "Whether the pool is watched and warned about."),
    Key(
        "watch.interval",
        _interval,
        "a time such as 10s, more than 0 and at most a day",
        "How often the pool is looked at.",
        _show_duration,
    ),
    Key(
        "watch.data-low-water",
        _percent,
        "a number from 0 to 100",
        "Percent of the data space that should be free.",
    ),
    Key(
        "watch.metadata-low-water",
        _percent,
        "a number from 0 to 100",
        "Percent of the metadata space that should be free.",
    ),
)
_BY_NAME: Final = {key.name: key for key in KEYS}
_TABLES: Final = tuple(dict.fromkeys(key.table for key in KEYS if key.table))


def read_file(path: Path) -> Tree:
    """The tree of a file, whose values are not looked at yet; `UsageError` for what is no TOML."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as err:
        raise UsageError(f"config file {str(path)!r} cannot be read: {err.strerror}") from err
    if len(data) > _MAX_FILE:
        raise UsageError(f"config file {str(path)!r} has more than {_MAX_FILE} bytes")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as err:
        raise UsageError(f"config file {str(path)!r} is not TOML: {err}") from err


def with_file(config: Config, path: Path) -> Config:
    """*config* with what a file says; `UsageError` names the file, the key and what it takes."""
    return _with_tree(config, read_file(path), lambda name: f"config file {str(path)!r}: {name}")


def with_options(config: Config, values: Mapping[str, object]) -> Config:
    """*config* with what the command line says, by the names of the keys."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        table, _, key = name.rpartition(".")
        (tree.setdefault(table, {}) if table else tree)[key] = value
    return _with_tree(config, tree, lambda name: f"option {_BY_NAME[name].option}")


def _with_tree(config: Config, tree: Tree, place: Callable[[str], str]) -> Config:
    changes: dict[str, Any] = {}
    for name, value in _flattened(tree, place):
        key = _BY_NAME[name]
        try:
            changes[key.attribute] = key.read(value)
        except _WrongValueError:
            raise UsageError(f"{place(name)} is {_shown(value)}, expected {key.expected}") from None
        except UsageError as err:
            raise UsageError(f"{place(name)}: {err}", hint=err.hint) from err
    # A table that is there means that its service is wanted
    for table in _TABLES:
        enabled = f"{table}_enabled"
        if table in tree and f"{table}.enabled" in _BY_NAME:
            changes.setdefault(enabled, True)
    return replace(config, **changes)


def _flattened(tree: Tree, place: Callable[[str], str]) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in tree.items():
        if name in _TABLES:
            if not isinstance(value, dict):
                raise UsageError(f"{place(name)} is {_shown(value)}, expected a table [{name}]")
            found += [(f"{name}.{key}", each) for key, each in value.items()]
        else:
            found.append((name, value))
    for name, _ in found:
        # A key with a dot in quotes belongs to no table, whatever it looks like
        if name not in _BY_NAME or (name in tree and "." in name):
            table = name.rpartition(".")[0]
            known = [key.name for key in KEYS if key.table == (table if table in tree else "")]
            tables = [] if table in tree else [f"[{each}]" for each in _TABLES]
            raise UsageError(
                f"{place(name)} is unknown", hint=f"known are: {', '.join(known + tables)}"
            )
    return found


def _shown(value: object) -> str:
    """A value in an error: enough to find it, on one line."""
    text = "true" if value is True else "false" if value is False else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def to_toml(config: Config) -> str:
    """The file that says the same; what is made of the graph is a comment."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    lines: list[str] = []
    for table in ("", *_TABLES):
        if table:
            lines += ["", f"[{table}]"]
        for key in KEYS:
            if key.table != table:
                continue
            name, value = key.name.rpartition(".")[2], values[key.attribute]
            if value is None:
                lines.append(f'# {name} = ""  # made of the graph')
            else:
                lines.append(f"{name} = {_toml(key.show(value))}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int | float):
        return repr(int(value) if value == int(value) else value)
    # A string of JSON is one of TOML, but for DEL
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
