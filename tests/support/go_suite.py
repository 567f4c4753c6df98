"""Test suites in Go below tests/suites: built from Debian's packaged sources, once for each source.

What is built is kept in `.cache` under the checksum of all that it is made from.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parent.parent.parent
SUITES: Final = CHECKOUT / "tests" / "suites"
GO_SOURCES: Final = Path("/usr/share/gocode/src")
_CACHE: Final = CHECKOUT / ".cache" / "suites"
_SECONDS: Final = 900.0


def names() -> list[str]:
    return sorted(path.parent.name for path in SUITES.glob("*/apt-packages"))


@functools.cache
def missing(name: str) -> str:
    """Why the suite *name* cannot be built here, "" if it can."""
    if shutil.which("go") is None:
        return "go is not installed (Debian: golang-go)"
    for package in (SUITES / name / "apt-packages").read_text().split():
        if not _version(package):
            return f"{package} is not installed"
    return ""


def build(name: str) -> Path:
    """The program of the suite *name*, built unless it was before."""
    target = _CACHE / f"{name}-{_key(SUITES / name)}"
    if target.exists():
        return target
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in _CACHE.glob(f"{name}-*"):
                old.unlink()
            _compile(name, target)
    return target


def _compile(name: str, target: Path) -> None:
    part = target.with_suffix(".part")
    done = subprocess.run(
        [str(SUITES / name / "build"), str(part)],
        env={**os.environ, "GOCACHE": str(CHECKOUT / ".cache" / "go")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    part.rename(target)


def _key(folder: Path) -> str:
    """Of the suite's own files and of the packages it is compiled from."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    for package in (folder / "apt-packages").read_text().split():
        found.update(f"{package} {_version(package)}\n".encode())
    return found.hexdigest()[:16]


@functools.cache
def _version(package: str) -> str:
    """Empty for one that is not installed."""
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f=${Status} ${Version}", package], capture_output=True, text=True
    )
    installed, _, version = asked.stdout.rpartition(" ")
    return version if asked.returncode == 0 and installed == "install ok installed" else ""
