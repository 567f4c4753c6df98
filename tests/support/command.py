"""The real command in processes of its own, on a graph of its own."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import capabilities
from tests.support.thin_tools import thin_check

PROGRAM = [sys.executable, "-m", "devmapper.cli.main"]
SMALL = ("dm.loopdatasize=1G", "dm.loopmetadatasize=16M", "dm.basesize=256M")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """The one sentence of a command that failed, its hint aside; no traceback, no more."""
        lines = self.err.splitlines()
        assert lines, "no message"
        assert lines[0].startswith("devmapper: "), self.err
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), self.err
        return lines[0].removeprefix("devmapper: ")


class Command:
    """`devmapper` with one home and its options."""

    def __init__(
        self, home: Path, options: tuple[str, ...] = SMALL, *, engine: str = "auto"
    ) -> None:
        self.home = home
        self.options = options
        self.engine = engine

    def argv(self, *words: object, options: tuple[str, ...] = ()) -> list[str]:
        chosen = [f"--storage-opt={option}" for option in (*self.options, *options)]
        return [
            *PROGRAM, "--root", str(self.home), "--engine", self.engine, *chosen,
            *map(str, words),
        ]  # fmt: skip

    def start(self, *words: object, **kwargs: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self.argv(*words), **kwargs)

    def run(
        self, *words: object, stdin: bytes = b"", options: tuple[str, ...] = (), cwd: str = "/"
    ) -> Ended:
        done = subprocess.run(
            self.argv(*words, options=options),
            input=stdin, capture_output=True, timeout=120, check=False, cwd=cwd,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr.decode(errors="replace"))

    def __call__(self, *words: object, stdin: bytes = b"") -> Ended:
        """Run it and demand success without a word on stderr."""
        ended = self.run(*words, stdin=stdin)
        assert (ended.status, ended.err) == (0, ""), (words, ended)
        return ended

    def fails(
        self, status: int, *words: object, stdin: bytes = b"", options: tuple[str, ...] = ()
    ) -> str:
        """Run it and demand this exit code, no data, and one sentence, which is returned."""
        ended = self.run(*words, stdin=stdin, options=options)
        assert ended.status == status, (words, ended)
        assert ended.out == b"", ended
        return ended.message

    def stop(self) -> None:
        self("engine", "stop", "--force")

    def state(self) -> str:
        """A digest of all that is durable in the home: names, records, pool metadata, data.

        Call while no engine runs.
        """
        digest = hashlib.sha256()
        for path in sorted(self.home.rglob("*")):
            if path.name == "lock":
                continue  # it names who held it last
            digest.update(f"{path.relative_to(self.home)} {path.lstat().st_mode}\n".encode())
            if path.is_file():
                _add_content(digest, path)
        return digest.hexdigest()


@contextmanager
def commands(home: Path, options: tuple[str, ...] = SMALL) -> Iterator[Command]:
    """A command whose engine is stopped afterwards, and whose pool is sound then."""
    command = Command(home, options)
    try:
        yield command
    finally:
        if (home / "metadata").is_dir():
            command.stop()
    metadata = home / "devicemapper" / "metadata"
    if metadata.exists() and not capabilities.tools():
        checked = thin_check(metadata)
        assert checked, checked.output
    assert not [
        line for line in Path("/proc/mounts").read_text().splitlines() if f" {home}" in line
    ]
    assert not _loop_devices_on(home)


def _add_content(digest: "hashlib._Hash", path: Path) -> None:
    """Size and data of a file, without reading its holes."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(f"{size}\n".encode())
        end = 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                break  # a hole to the end
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            file.seek(start)
            digest.update(f"{start}\n".encode() + file.read(end - start))


def _loop_devices_on(home: Path) -> list[str]:
    base = os.environ.get("DEVMAPPER_RUNTIME_DIR", "/run/devmapper")
    done = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if str(home) in line or f"({base}/" in line]
