"""How results are shown: tables for people, JSON for programs, progress on a terminal only.

stdout carries data and nothing else.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from devmapper.cli.settings import Settings
from devmapper.errors import UsageError

Advance = Callable[[int], None]  # the bytes or blocks just done

_GAP: Final = "  "
_NAME_MAX: Final = 255


class Column(NamedTuple):
    """One column of a table."""

    title: str
    is_number: bool = False


def show(settings: Settings, value: object, text: str = "") -> None:
    """Print *value* for a program, or *text*, if there is any, for people."""
    if settings.json:
        print(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=True))
    elif text:
        print(printable(text))


def printable(text: str) -> str:
    """Names of files are bytes: what is no text is shown escaped, never an error."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under titles: in style on a terminal, aligned in a pipe."""
    if not sys.stdout.isatty():
        _plain_table(columns, rows)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styled = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        styled.add_column(column.title, justify="right" if column.is_number else "left")
    for row in rows:
        styled.add_row(*(Text(cell) for cell in row))
    Console().print(styled)


def _plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    lines = [[column.title for column in columns], *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        print(_GAP.join(cells).rstrip())


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of names and values as `docker info` prints them: one leading blank."""
    return "\n".join(f" {name}: {value}" for name, value in rows)


def binary_stdout() -> BinaryIO:
    """Where an archive goes; a terminal is refused."""
    if sys.stdout.isatty():
        raise UsageError("an archive is not written to a terminal", hint="use -o FILE, or a pipe")
    return sys.stdout.buffer


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is there when all of it is: after a failure the old one, or none."""
    if path.exists() and not path.is_file():
        with open(path, "wb") as special:  # a device or a pipe has no old content
            yield special
        return
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}"[:_NAME_MAX])
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def progress(label: str, total: int | None, *, is_bytes: bool = True) -> Iterator[Advance | None]:
    """A bar on a terminal; None where stderr is not one."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(),)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
