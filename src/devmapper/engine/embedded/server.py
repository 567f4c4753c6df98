"""The engine process: owns a pool, exports its devices, answers on the control socket.

    python -m devmapper.engine.embedded.server <pool> <ready fd> <lock fd> <table as JSON>

It is started by `starting` and outlives the command that did it.  Its threads: the export's, which
serve I/O; one for each connection; the main thread, which accepts connections and hears signals.

SIGTERM and SIGINT: everything that stands on the devices is taken down by a child process
(`teardown`), then the pool is closed.  If something keeps a device busy, the log says who, and
serving goes on; a second signal within a minute forces.  SIGHUP is ignored.

This process never opens, mounts, freezes or configures what stands above its own export.  A thread
of it that waited there would wait for itself, even through SIGKILL.
"""

import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final

from devmapper.engine.embedded import protocol, runtime
from devmapper.engine.embedded.export import Export
from devmapper.engine.embedded.exports import Exports
from devmapper.engine.embedded.operations import Operations
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.embedded.suspension import Suspensions, SuspensionSession
from devmapper.engine.port import PoolTable
from devmapper.errors import DevmapperError, EngineError
from devmapper.linux import libc

log = logging.getLogger(__name__)

PROCESS_NAME: Final = "devmapper-engine"
_LOG_BYTES: Final = 1 << 20
_FORCE_SECONDS: Final = 60.0
_TEARDOWN_SECONDS: Final = 120.0
_ACCEPT_PAUSE_SECONDS: Final = 0.1
_UCRED: Final = struct.Struct("=3i")


class Server:
    """One engine process."""

    def __init__(self, paths: runtime.Paths, table: PoolTable) -> None:
        self._paths = paths
        self._pool = EmbeddedPool.open(table, name=paths.directory.name)
        try:
            export = Export(paths.export)
            export.start()
        except BaseException:
            self._pool.close()
            raise
        self._exports = Exports(self._pool, export)
        self._suspensions = Suspensions(self._exports)
        self._operations = Operations(self._pool, self._exports, paths)
        self._stopping = threading.Lock()
        self._closed = False
        self._ended = False
        self._tearing_down = False
        self._last_signal = -_FORCE_SECONDS
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._listener = runtime.listen(paths)

    def serve(self, ready: Callable[[], None]) -> None:
        """Answer until the pool is closed; *ready* is called when clients can connect."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the wakeup descriptor tells
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        watched: list[socket.socket | int] = [self._listener, self._wake_read]
        ready()
        while not self._ended:
            readable, _, _ = select.select(watched, [], [])
            if self._wake_read in readable:
                woken_by = os.read(self._wake_read, 64)
                if signal.SIGTERM in woken_by or signal.SIGINT in woken_by:
                    self._terminate()
            if self._listener in readable and not self._ended:
                self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as err:
            # Out of descriptors, or the client has gone; ending would take the disks away
            log.warning("cannot accept a connection: %s", err)
            time.sleep(_ACCEPT_PAUSE_SECONDS)
            return
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, user, _ = _UCRED.unpack(raw)
        if user not in (0, os.geteuid()):
            connection.close()
            return
        thread = threading.Thread(
            target=self._converse, args=(connection,), name="control", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as err:  # no more threads
            log.warning("cannot serve a connection: %s", err)
            connection.close()

    def _converse(self, connection: socket.socket) -> None:
        """Answer one client until it closes the connection."""
        session = self._suspensions.session()
        try:
            with connection:
                while True:
                    with protocol.received(connection) as (request, descriptor):
                        answer = self._answer(session, request, descriptor)
                    protocol.send(connection, answer)
                    if self._closed:
                        self._end()
        except (protocol.Disconnected, OSError):
            pass
        except DevmapperError as err:
            log.warning("a client broke the protocol: %s", err)
        finally:
            session.close()

    def _answer(
        self, session: SuspensionSession, request: Mapping[str, Any], descriptor: int | None
    ) -> dict[str, object]:
        try:
            if request.get("version") != protocol.VERSION:
                raise EngineError(
                    f"engine process speaks version {protocol.VERSION} of its protocol, but was"
                    f" asked in version {request.get('version')}",
                    hint="stop it with the version of devmapper that started it",
                )
            op, args = request.get("op"), request.get("args")
            if not isinstance(op, str) or not isinstance(args, dict):
                raise EngineError("a request has no op or no args")
            if op == "stop":
                self._stop()
                return {"value": None}
            if op in session.OPS:
                session.call(op, args)
                return {"value": None}
            return {"value": protocol.pack(self._call(op, args, descriptor))}
        except (DevmapperError, OSError) as err:
            log.debug("%s: %s", request.get("op"), err)
            return {"error": protocol.pack_error(err)}
        except Exception as err:
            log.exception("defect while answering %s", request.get("op"))
            return {"error": protocol.pack_error(err)}

    def _call(self, op: str, args: dict[str, Any], descriptor: int | None) -> object:
        if self._closed or (self._tearing_down and op in ("activate", "serve_nbd")):
            raise EngineError("engine process is stopping")
        return self._operations.call(op, args, descriptor)

    def _stop(self, *, force: bool = False) -> None:
        """Close the export, then the pool: commits, and nothing of ours is left in the kernel."""
        with self._stopping:
            if self._closed:
                return
            self._exports.close(force=force)
            try:
                self._pool.close()
            finally:
                self._closed = True
                self._paths.socket.unlink(missing_ok=True)
        log.info("stopped")

    def _terminate(self) -> None:
        """Stop for a signal, in a thread of its own: the child that helps needs our answers."""
        now = time.monotonic()
        force = now - self._last_signal < _FORCE_SECONDS
        self._last_signal = now
        threading.Thread(
            target=self._tear_down, kwargs={"force": force}, name="teardown", daemon=True
        ).start()

    def _tear_down(self, *, force: bool) -> None:
        log.info("asked to end%s", ", for the second time: forced" if force else "")
        self._tearing_down = True
        try:
            self._run_teardown(force=force)
            self._stop(force=force)
        except (DevmapperError, OSError) as err:
            log.warning("still serving: %s", err)
        except Exception:
            log.exception("cannot end")
        finally:
            self._tearing_down = False
            if self._closed:
                self._end()

    def _run_teardown(self, *, force: bool) -> None:
        argv = [sys.executable, "-P", "-m", "devmapper.engine.embedded.teardown"]
        argv += [self._paths.directory.name, *(["--force"] if force else [])]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
                timeout=_TEARDOWN_SECONDS,
            )
        except subprocess.TimeoutExpired as err:
            if force:
                log.warning("unmounting takes too long; going on without it")
                return
            raise EngineError("unmounting what stands on the devices takes too long") from err
        for line in done.stderr.decode(errors="replace").splitlines():
            log.warning("teardown: %s", line)
        if done.returncode != 0 and not force:
            raise EngineError("something keeps a device busy")

    def _end(self) -> None:
        """Let `serve` return; the one who asked for the end has been answered."""
        self._ended = True
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")


def main(argv: list[str]) -> None:
    """Become the engine process of a pool; tell the starter through the pipe how it went."""
    name, ready_text, lock_text, table_text = argv
    ready_fd, lock_fd = int(ready_text), int(lock_text)
    _detach()
    with suppress(OSError):  # without the privilege, or before Linux 5.6
        libc.set_io_flusher()  # before there are threads: they inherit it
    paths = runtime.paths_of(name)
    _log_to(paths.log)
    try:
        runtime.write_pid(paths)
        table = protocol.unpack(PoolTable, json.loads(table_text))
        server = Server(paths, table)
    except BaseException as err:  # the starter raises it
        log.error("cannot start: %s", err, exc_info=not isinstance(err, DevmapperError))  # noqa: TRY400
        _tell(ready_fd, {"error": protocol.pack_error(err)})
        os._exit(1)

    def ready() -> None:
        log.info("serving pool %s as process %d", name, os.getpid())
        _tell(ready_fd, {"value": None})
        os.close(lock_fd)

    server.serve(ready)
    runtime.remove_directory(paths)
    logging.shutdown()
    # Threads of connections that clients keep open must not delay the end
    os._exit(0)


def _detach() -> None:
    """Leave the starter: nobody's child but init's, own session, known by name to ps."""
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    Path("/proc/self/comm").write_text(PROCESS_NAME[:15], encoding="ascii")
    with suppress(OSError):  # without the privilege it is killed like any other
        # Killing this process takes the disks away from everybody who has one
        Path("/proc/self/oom_score_adj").write_text("-1000", encoding="ascii")


def _log_to(path: Path) -> None:
    handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _tell(fd: int, message: Mapping[str, object]) -> None:
    # The starter may have died; that is no reason to end
    with suppress(BrokenPipeError):
        os.write(fd, json.dumps(message).encode("ascii"))
    os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1:])
