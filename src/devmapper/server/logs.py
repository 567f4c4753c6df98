"""The daemon's log: one line an event on stderr, for the journal or for people."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Final, TextIO

from devmapper.server.config import LogFormat, LogLevel

_STREAM: Final = "JOURNAL_STREAM"
_FOREIGN_LEVEL: Final = logging.WARNING  # of libraries, unless debugging
# sd-daemon(3): <N> with the numbers of syslog(3)
_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)


def start(
    level: LogLevel, wanted: LogFormat, environment: Mapping[str, str] = os.environ
) -> logging.Handler:
    """Log to stderr from now on, and nothing anywhere else."""
    stream = sys.stderr
    journal = (
        is_journal(stream, environment) if wanted is LogFormat.AUTO else wanted is LogFormat.JOURNAL
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JournalFormatter() if journal else TextFormatter())
    root = logging.getLogger()
    for other in root.handlers[:]:
        root.removeHandler(other)
    root.addHandler(handler)
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(number if number < logging.INFO else max(number, _FOREIGN_LEVEL))
    logging.getLogger("devmapper").setLevel(number)
    return handler


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether the journal reads *stream*: systemd.exec(5), JOURNAL_STREAM."""
    device, _, inode = environment.get(_STREAM, "").partition(":")
    try:
        found = os.fstat(stream.fileno())
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def prefixed(level: int, text: str) -> str:
    """Each line of *text* with the journal's number for *level*."""
    number = next((each for least, each in _PRIORITIES if level >= least), 7)
    return "\n".join(f"<{number}>{line}" for line in text.splitlines() or [""])


class JournalFormatter(logging.Formatter):
    """Each line with its priority; the journal knows the time itself."""

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return prefixed(record.levelno, super().format(record))


class TextFormatter(logging.Formatter):
    """Time in UTC, level, event; the lines of a traceback are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{seconds}.{int(record.msecs):03d}Z"

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(super().format(record).splitlines())
