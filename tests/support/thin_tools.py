"""The oracle: thin-provisioning-tools, run on files."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.support import capabilities

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Checked(NamedTuple):
    """What thin_check said; true when it found nothing."""

    clean: bool
    output: str

    def __bool__(self) -> bool:
        return self.clean


def _run(*argv: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PATH": _PATH, "LC_ALL": "C"}
    return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)


def thin_check(path: Path) -> Checked:
    done = _run("thin_check", str(path))
    return Checked(done.returncode == 0, done.stdout + done.stderr)


def thin_dump(path: Path, *options: str) -> str:
    done = _run("thin_dump", *options, str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout


def thin_check_fails(path: Path) -> str:
    """Demand that thin_check finds something; returns what it says."""
    checked = thin_check(path)
    assert not checked, f"thin_check found nothing in {path}"
    return checked.output


def have_thin_tools() -> bool:
    return not capabilities.tools()


def thin_restore(xml: Path, path: Path, metadata_size: int = 0) -> None:
    """Make metadata from XML; a *metadata_size* makes the file first, of so many bytes."""
    if metadata_size:
        with path.open("wb") as file:
            file.truncate(metadata_size)
    done = _run("thin_restore", "-i", str(xml), "-o", str(path))
    assert done.returncode == 0, done.stderr


def thin_ls(path: Path, *options: str) -> str:
    done = _run("thin_ls", *options, str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout


def thin_delta(path: Path, left: int, right: int, *options: str) -> str:
    done = _run("thin_delta", "--thin1", str(left), "--thin2", str(right), *options, str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout
