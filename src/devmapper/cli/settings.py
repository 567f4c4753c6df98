"""The options before the command, and the driver that a command opens with them."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from devmapper.errors import EnvironmentLacking, GraphLocked, PoolNotFound, UsageError

if TYPE_CHECKING:
    import typer

    from devmapper.deviceset.id_maps import IdMap
    from devmapper.deviceset.options import Options
    from devmapper.driver import Driver
    from devmapper.engine.select import Preference
    from devmapper.graph.model import OpenGraph
    from devmapper.graph.remote import RemoteGraph

DEFAULT_ROOT: Final = Path("/var/lib/devmapper")
_ANSWER_SECONDS: Final = 5.0  # that a daemon may take to start, or to end
_POLL_SECONDS: Final = 0.05
PREFERENCES: Final = ("auto", "kernel", "embedded")


@dataclass(slots=True)
class Settings:
    """What the user wrote before the command; filled in while the command line is read."""

    root: Path = DEFAULT_ROOT
    storage_options: list[str] = field(default_factory=list)
    engine: "Preference" = "auto"
    id_maps: "list[IdMap]" = field(default_factory=list)
    json: bool = False
    verbose: int = 0


def settings_of(context: "typer.Context") -> Settings:
    """The settings of the command line that *context* belongs to."""
    found = context.obj
    if not isinstance(found, Settings):
        raise TypeError(f"settings expected, not {type(found).__name__}")
    return found


def preference(text: str) -> "Preference":
    """Check what was given for `--engine`."""
    match text:
        case "auto" | "kernel" | "embedded":
            return text
        case _:
            raise UsageError(f"engine {text!r} is none of {', '.join(PREFERENCES)}")


def check_layer_ids(*ids: str) -> None:
    """`UsageError` before anything is opened or made."""
    from devmapper.deviceset.names import layer_id

    for text in ids:
        layer_id(text)


@contextmanager
def opened_graph(settings: Settings, *, create: bool = False) -> "Iterator[OpenGraph]":
    """The graph at the daemon that holds it, or opened here if there is none.

    Otherwise as `opened_driver`.
    """
    require_root()
    if not create:
        require_graph(settings)
    remote = at_daemon(settings)
    if remote is not None:
        yield remote
        return
    from devmapper.graph.local import LocalGraph

    with opened_driver(settings, create=create) as driver:
        yield LocalGraph(driver)


def at_daemon(settings: Settings) -> "RemoteGraph | None":
    """The graph at its daemon, with whose options those of the command line agree (`UsageError`).

    None if there is no daemon.  One that starts, ends or hangs does not answer: `GraphLocked` after
    a few seconds.
    """
    socket = _control_socket(settings)
    if socket is None:
        return None
    from devmapper.graph.remote import RemoteGraph

    deadline = time.monotonic() + _ANSWER_SECONDS
    while socket is not None:
        remote = RemoteGraph(socket)
        try:
            remote.check_answers(_ANSWER_SECONDS)
        except OSError as err:
            if time.monotonic() >= deadline:
                raise _locked(settings, "it does not answer: see its log") from err
            time.sleep(_POLL_SECONDS)
            socket = _control_socket(settings)
            continue
        words = tuple(settings.storage_options), tuple(map(str, settings.id_maps))
        if any(words) or settings.engine != "auto":
            remote.agree(settings.engine, *words)
        return remote
    return None


def require_no_daemon(settings: Settings) -> None:
    """`GraphLocked` if a daemon holds the graph: for what nobody may do behind its back."""
    if _control_socket(settings) is not None:
        raise _locked(settings, "stop the daemon before: systemctl stop devmapper")


def _control_socket(settings: Settings) -> Path | None:
    from devmapper.server.lock import serving

    return serving(settings.root) if settings.root.is_dir() else None


def _locked(settings: Settings, hint: str) -> GraphLocked:
    from devmapper.linux.files import FileLock
    from devmapper.server.lock import LOCK_FILE

    error = GraphLocked(settings.root, FileLock(settings.root / LOCK_FILE).holder())
    error.hint = hint
    return error


@contextmanager
def opened_driver(settings: Settings, *, create: bool = False) -> Iterator["Driver"]:
    """The driver of the graph in this process; what is mounted when the command ends stays mounted.

    Without *create* a graph that is not there is `PoolNotFound`, and nothing is made.
    """
    require_root()
    if not create:
        require_graph(settings)
    from devmapper.driver import init_mapped

    with init_mapped(
        settings.root,
        settings.storage_options,
        engine=settings.engine,
        id_maps=settings.id_maps,
    ) as driver:
        yield driver


def own_pool(settings: Settings) -> "tuple[Options, str]":
    """The options of the graph as it is made, and the name of its pool; nothing is opened."""
    from devmapper.deviceset.names import GraphNames
    from devmapper.deviceset.options import parse_options
    from devmapper.deviceset.setup_config import with_given_pool

    options = with_given_pool(settings.root, parse_options(settings.storage_options))
    return options, GraphNames.of(settings.root, options.thin_pool_device).pool


def require_root() -> None:
    """Say in the words of a user what all layers need."""
    if os.geteuid() != 0:
        raise EnvironmentLacking(
            "layers are mounted file systems, which only root can make",
            hint="run the command with sudo; pool check FILE and pool dump FILE need no root",
        )


def require_graph(settings: Settings) -> None:
    """`PoolNotFound` if nothing was ever made in the root."""
    if not (settings.root / "metadata").is_dir():
        raise PoolNotFound(
            f"there is no graph in {str(settings.root)!r}",
            hint="devmapper create and devmapper import make one; --root names another place",
        )
