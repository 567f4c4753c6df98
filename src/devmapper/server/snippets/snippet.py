"""A piece of somebody else's configuration, and which of its forms that somebody reads."""

import re
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.errors import EnvironmentLacking, ToolError, UsageError
from devmapper.linux import process

_RELEASE: Final = re.compile(r"\bv?(\d+)\.(\d+)(?:\.\d+)?", re.ASCII)
_SECONDS: Final = 10.0


class Release(NamedTuple):
    """Major and minor number of a program."""

    major: int
    minor: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class Snippet(NamedTuple):
    """What belongs into *file*; a file that is there already has to be merged with it by hand."""

    file: Path
    text: str
    notes: tuple[str, ...] = ()  # what has to be done besides, a sentence each


def installed_release(program: str) -> Release | None:
    """What `PROGRAM --version` says; None where it is not installed or says nothing."""
    try:
        said = process.run([program, "--version"], timeout=_SECONDS).stdout
    except (EnvironmentLacking, ToolError, OSError, subprocess.SubprocessError):
        return None
    found = _RELEASE.search(said.decode(errors="replace"))
    return None if found is None else Release(int(found[1]), int(found[2]))


def parse_release(text: str) -> Release:
    """Read `27`, `1.6` or `2.1.4`; `UsageError`."""
    found = re.fullmatch(r"v?(\d{1,4})(?:\.(\d{1,4}))?(?:\.\d{1,4})*", text, re.ASCII)
    if found is None:
        raise UsageError(f"release {text!r} is not a number such as 27 or 1.6")
    return Release(int(found[1]), int(found[2] or 0))
