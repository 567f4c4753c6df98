"""`devmapper top`: the pool, its layers and the daemon's work on a terminal, as they change."""

import functools
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Final

import typer

from devmapper.cli.output import show
from devmapper.cli.settings import (
    Settings,
    at_daemon,
    opened_driver,
    require_graph,
    require_root,
    settings_of,
)
from devmapper.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from devmapper.server.overview import Overview

_KEY_SECONDS: Final = 0.2  # how soon a new size of the window is seen
_LONGEST_INTERVAL: Final = 3600.0
_END: Final = b"qQ\x04"

Look = Callable[[], "Overview"]


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", help="Time between two frames."),
    ] = 2.0,
) -> None:
    """Show pool, layers and requests as they change.

    Layers are sorted by what removing them gives back. Requests are those of the daemon, if one
    serves the graph. q or Ctrl-C ends it. Where stdout is not a terminal, or with --json, one frame
    is printed.

    Example: devmapper top --interval 5
    """
    settings = settings_of(context)
    if not 0 < interval <= _LONGEST_INTERVAL:
        raise UsageError(f"interval {interval} is not between 0 and {_LONGEST_INTERVAL} seconds")
    with _looking(settings) as look:
        if settings.json:
            from devmapper.server.overview import to_json

            show(settings, to_json(look()))
            return
        from rich.console import Console

        console = Console()
        if once or not console.is_terminal or console.is_dumb_terminal:
            _print_one(console, look)
        else:
            with suppress(KeyboardInterrupt):  # a way to end it like any other
                _go_on(console, look, interval)


@contextmanager
def _looking(settings: Settings) -> Iterator[Look]:
    """How to look at the graph of this command line."""
    from devmapper.server.observer import Observer
    from devmapper.server.overview import from_json, look

    require_root()
    require_graph(settings)
    remote = at_daemon(settings)
    if remote is not None:
        yield lambda: from_json(remote.overview())
        return
    with opened_driver(settings) as driver:
        observer = Observer(driver)
        try:
            yield lambda: look(observer)
        finally:
            observer.stop()


def _print_one(console: "Console", look: Look) -> None:
    from devmapper.cli.frame import frame

    console.print(frame(look(), None, width=console.width, height=None))


def _go_on(console: "Console", look: Look, interval: float) -> None:
    from rich.live import Live

    from devmapper.cli.frame import frame

    before = None
    with _single_keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            overview = look()
            until = time.monotonic() + interval
            while True:
                size = console.size
                shown = frame(overview, before, width=size.width, height=size.height)
                live.update(shown, refresh=True)
                if _ended(keys, until, functools.partial(_resized, console, size)):
                    return
                if time.monotonic() >= until:
                    break
            before = overview


def _resized(console: "Console", size: tuple[int, int]) -> bool:
    return console.size != size


def _ended(keys: int | None, until: float, resized: Callable[[], bool]) -> bool:
    """Wait until then, or until the window has another size; whether the user wants to end it."""
    while (left := until - time.monotonic()) > 0 and not resized():
        wait = min(left, _KEY_SECONDS)
        ready, _, _ = select.select([] if keys is None else [keys], [], [], wait)
        if ready and keys is not None:
            pressed = os.read(keys, 64)
            if not pressed or any(key in _END for key in pressed):
                return True
    return False


@contextmanager
def _single_keys() -> Iterator[int | None]:
    """stdin key by key, without echo, as it was before afterwards; None if it is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)  # Ctrl-C stays what it is
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
