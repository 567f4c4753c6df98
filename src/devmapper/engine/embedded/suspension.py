"""Suspensions as the engine process sees them: each belongs to a connection.

A client announces the mount points that it is about to freeze, suspends the device, resumes it and
closes the connection.  If the client dies amid it, the connection ends as well: the device is
resumed, and a child process thaws what was announced.
"""

import logging
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from devmapper.engine.embedded import protocol
from devmapper.engine.embedded.exports import Exports
from devmapper.errors import DevmapperError, EngineError
from devmapper.linux.process import find_tool

log = logging.getLogger(__name__)

_THAW_SECONDS: Final = 60.0


class Suspensions:
    """Makes a session for each connection."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports

    def session(self) -> "SuspensionSession":
        return SuspensionSession(self._exports)


class SuspensionSession:
    """What one connection has announced and suspended."""

    OPS: Final = frozenset({"announce", "suspend", "resume", "withdraw"})

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self._announced: list[Path] = []
        self._suspended: str | None = None

    def call(self, op: str, args: Mapping[str, Any]) -> None:
        """Answer one of OPS."""
        match op:
            case "announce":
                self._announced = protocol.unpack(list[Path], args.get("mount_points"))
            case "withdraw":
                self._announced = []
            case "suspend":
                if self._suspended is not None:
                    raise EngineError(f"this connection has suspended {self._suspended!r} already")
                name = protocol.unpack(str, args.get("name"))
                self._exports.suspend(name)
                self._suspended = name
            case "resume":
                self._resume()
            case _:
                raise EngineError(f"engine process knows no operation {op!r}")

    def close(self) -> None:
        """Undo what the client has left: it died, or its own undoing failed."""
        if self._suspended is not None:
            log.warning("client of suspended device %s is gone: resuming it", self._suspended)
            try:
                self._resume()
            except (DevmapperError, OSError):
                log.exception("cannot resume %s", self._suspended)
        for point in self._announced:
            _thaw(point)

    def _resume(self) -> None:
        name, self._suspended = self._suspended, None
        if name is not None:
            self._exports.resume(name)


def _thaw(point: Path) -> None:
    """Thaw in a child: a thread of this process must not wait for what stands on its own export."""
    try:
        child = subprocess.Popen(
            [find_tool("fsfreeze"), "--unfreeze", str(point)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        status = child.wait(_THAW_SECONDS)
    except (DevmapperError, OSError, subprocess.TimeoutExpired):
        log.exception("cannot thaw %s", point)
        return
    # Not frozen, or frozen once and mounted twice, is a failure of fsfreeze but none of ours
    log.info("thawed %s after its client was gone (status %d)", point, status)
