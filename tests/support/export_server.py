"""An `Export` in a process of its own, driven by the test line by line.

The process that serves a mount must not use it, and pytest does.  `ExportServer` starts this module
as a program and sends it one JSON list per line, `[method, *arguments]`; the answer is
`{"result": …}` or `{"errno": …}`.
"""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from devmapper.engine.embedded.export import Export
from devmapper.engine.port import PoolTable
from devmapper.linux import files, mount
from devmapper.units import MIB, Bytes, ThinId

BLOCK_SIZE = Bytes(64 * 1024)


class Gate:
    """Counts the calls of a target, and holds them back or breaks them on demand."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.open = threading.Event()
        self.open.set()
        self.failure = ""

    def enter(self, call: str) -> None:
        self.calls[call] += 1
        self.open.wait()
        if self.failure == "bug":
            raise RuntimeError("a bug of the target")
        if self.failure:
            raise OSError(int(self.failure), "asked for")


class MemoryTarget:
    """A disk in memory that knows which of its blocks are mapped."""

    block_size = BLOCK_SIZE

    def __init__(self, size: int) -> None:
        self.size = Bytes(size)
        self.gate = Gate()
        self.mapped: set[int] = set()
        self._data = bytearray(size)

    def read(self, offset: int, view: memoryview) -> None:
        self.gate.enter("read")
        view[:] = self._data[offset : offset + len(view)]

    def write(self, offset: int, view: memoryview) -> None:
        self.gate.enter("write")
        self._data[offset : offset + len(view)] = view
        self.mapped.update(range(offset // BLOCK_SIZE, -(-(offset + len(view)) // BLOCK_SIZE)))

    def flush(self) -> None:
        self.gate.enter("flush")

    def discard(self, offset: int, length: int) -> None:
        self.gate.enter("discard")
        self._data[offset : offset + length] = bytes(length)
        covered = range(-(-offset // BLOCK_SIZE), (offset + length) // BLOCK_SIZE)
        self.mapped.difference_update(covered)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.gate.enter("write_zeroes")
        self._data[offset : offset + length] = bytes(length)

    def grow(self, size: int) -> None:
        self._data += bytes(size - self.size)
        self.size = Bytes(size)


class FileTarget:
    """A disk that is a file: what the export can do at best."""

    block_size = BLOCK_SIZE

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size = Bytes(os.fstat(self._fd).st_size)
        self.gate = Gate()

    def read(self, offset: int, view: memoryview) -> None:
        os.preadv(self._fd, (view,), offset)

    def write(self, offset: int, view: memoryview) -> None:
        os.pwrite(self._fd, view, offset)

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        files.punch_hole(self._fd, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        files.zero_range(self._fd, offset, length)


class _Commands:
    """What the test can ask for."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._targets: dict[str, Any] = {}

    def add_memory(self, name: str, size: int) -> None:
        self._targets[name] = MemoryTarget(size)
        self._export.add(name, self._targets[name])

    def add_file(self, name: str, path: str) -> None:
        self._targets[name] = FileTarget(path)
        self._export.add(name, self._targets[name])

    def add_thin(self, name: str, directory: str, size: int) -> None:
        """A new pool on two sparse files in *directory*, and a thin device of it."""
        from devmapper.engine.embedded.pool import EmbeddedPool

        metadata, data = Path(directory) / "metadata", Path(directory) / "data"
        files.make_sparse(metadata, Bytes(64 * MIB))
        files.make_sparse(data, Bytes(size * 2))
        pool = EmbeddedPool.open(PoolTable(metadata, data, Bytes(size * 2), BLOCK_SIZE))
        pool.create_thin(ThinId(1))
        self._targets[name] = pool.open_device(ThinId(1), Bytes(size))
        self._export.add(name, self._targets[name])

    def remove(self, name: str, timeout: float) -> None:
        self._export.remove(name, timeout=timeout)

    def names(self) -> list[str]:
        return self._export.names()

    def open_count(self, name: str) -> int:
        return self._export.open_count(name)

    def grow(self, name: str, size: int) -> None:
        self._targets[name].grow(size)
        self._export.resize(name)

    def calls(self, name: str) -> dict[str, int]:
        return dict(self._targets[name].gate.calls)

    def mapped(self, name: str) -> int:
        return len(self._targets[name].mapped)

    def block(self, name: str) -> None:
        self._targets[name].gate.open.clear()

    def unblock(self, name: str) -> None:
        self._targets[name].gate.open.set()

    def fail(self, name: str, how: str) -> None:
        self._targets[name].gate.failure = how

    def threads(self) -> int:
        return threading.active_count()


class ExportServer:
    """The child process, as a context manager; methods of `_Commands` are called by `ask`."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.export_server", str(self.mountpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": "src:."},
        )
        assert self._receive() == "ready"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self.process = self.process, None
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
            if mount.is_mount_point(self.mountpoint):
                mount.unmount(self.mountpoint, flags=mount.UmountFlag.DETACH)

    def ask(self, command: str, *arguments: object) -> Any:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._receive()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)

    def _receive(self) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the export's process has ended")
        answer = json.loads(line)
        if number := answer.get("errno"):
            raise OSError(number, os.strerror(number))
        return answer["result"]


def _serve(mountpoint: Path) -> None:
    with Export(mountpoint) as export:
        commands = _Commands(export)
        print(json.dumps({"result": "ready"}), flush=True)
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            try:
                answer = {"result": getattr(commands, command)(*arguments)}
            except OSError as err:
                answer = {"errno": err.errno or errno.EIO}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
