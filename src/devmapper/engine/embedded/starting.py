"""Starting the engine process of a pool, and waiting for one that comes or goes.

Every function here is called with the start lock held.
"""

import json
import os
import select
import sys
import time
from pathlib import Path
from typing import Final

import devmapper.errors
from devmapper.engine.embedded import protocol, runtime
from devmapper.engine.port import PoolTable
from devmapper.errors import EngineError
from devmapper.linux import process

START_SECONDS: Final = 120.0
_MODULE: Final = "devmapper.engine.embedded.server"
_LOG_TAIL: Final = 2000


class NotReady(EngineError):
    """The engine process neither serves nor says why; its log may."""


def start(paths: runtime.Paths, table: PoolTable, lock_fd: int) -> None:
    """Start the engine process and return when it serves; what it could not do is raised here.

    It inherits *lock_fd*: while it starts nobody else can, even if this process dies.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            child = process.spawn_detached(
                [
                    sys.executable, "-P", "-m", _MODULE,
                    paths.directory.name, str(writer), str(lock_fd),
                    json.dumps(protocol.pack(table)),
                ],
                log_file=paths.log,
                pass_fds=(writer, lock_fd),
                environment=environment(paths),
            )  # fmt: skip
        finally:
            os.close(writer)
        answer = _read_to_end(reader, paths)
        child.wait()  # it has left the engine process to init
    finally:
        os.close(reader)
    if not answer:
        raise NotReady(
            f"engine process of pool {paths.directory.name!r} ended while it started:"
            f" {_last_line(paths.log)}",
            hint=f"see {paths.log}",
        )
    message = protocol.parse(answer)
    if (error := message.get("error")) is not None:
        raise protocol.unpack_error(error)


def await_end(paths: runtime.Paths, timeout: float) -> None:
    """Wait for an engine process that runs but does not answer; it is on its way out.

    `EngineError` if it still runs after *timeout* seconds.
    """
    identity = runtime.read_pid(paths)
    if identity is not None and not identity.wait(timeout):
        raise EngineError(
            f"engine process {identity.pid} of pool {paths.directory.name!r} runs, but does not"
            " answer",
            hint=f"see {paths.log}; if it hangs, kill -9 {identity.pid} and try again",
        )


def environment(paths: runtime.Paths) -> dict[str, str]:
    """What a program of ours needs so that it is this code and works on the same directories."""
    source = str(Path(devmapper.errors.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{source}:{inherited}" if inherited else source,
        runtime.ENVIRONMENT: str(paths.directory.parent),
    }


def _read_to_end(fd: int, paths: runtime.Paths) -> bytes:
    """What the engine process says until it closes the pipe."""
    deadline = time.monotonic() + START_SECONDS
    data = bytearray()
    while True:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise NotReady(
                f"engine process of pool {paths.directory.name!r} was not ready after"
                f" {START_SECONDS:.0f} seconds",
                hint=f"see {paths.log}",
            )
        piece = os.read(fd, 65536)
        if not piece:
            return bytes(data)
        data += piece


def _last_line(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        lines = []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
