"""A real daemon in a process of its own: `with served(tmp_path, docker=True) as daemon`."""

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support import capabilities
from tests.support.command import PROGRAM, SMALL, Command
from tests.support.thin_tools import thin_check

START_SECONDS: Final = 60.0
END_SECONDS: Final = 60.0


class Daemon:
    """`devmapper serve` on the graph in `home`; its sockets are in `sockets`, its log in `log`."""

    def __init__(
        self,
        home: Path,
        directory: Path,
        options: dict[str, Any],
        engine: str,
        program: Sequence[str],
    ) -> None:
        self.home = home
        self.program = program
        self.sockets = directory
        self.docker = directory / "devmapper.sock"
        self.containerd = directory / "containerd.sock"
        self.control = directory / "control.sock"
        self.metrics = directory / "metrics.sock"
        self.log = directory / "log"
        self.command = Command(home, engine=engine)
        self.process: subprocess.Popen[bytes] | None = None
        self.notified: list[str] = []
        self._config = directory / "config.toml"
        self._config.touch()
        self._options = options
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / "notify"))

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def argv(self) -> list[str]:
        words = [
            *self.program, "--root", str(self.home), "--engine", self.command.engine,
            *(f"--storage-opt={option}" for option in self.command.options),
            "serve", "--config", str(self._config), "--control-socket", str(self.control),
        ]  # fmt: skip
        for name, value in self._options.items():
            option = "--" + name.replace("_", "-")
            if name == "docker" and value is True:
                words += ["--docker-socket", str(self.docker)]
            elif name == "containerd" and value is True:
                words += ["--containerd-socket", str(self.containerd)]
            elif name == "metrics" and value is True:
                words += ["--metrics-address", f"unix:{self.metrics}"]
            elif isinstance(value, bool):
                words.append(option if value else f"--no-{option[2:]}")
            else:
                words += [option, str(value)]
        return words

    def start(self) -> None:
        """Start it and return when it says that it is ready."""
        assert self.process is None
        self.notified.clear()
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.sockets / "notify")}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        try:
            self.await_notice("READY=1", START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def await_notice(self, line: str, seconds: float) -> None:
        """Wait until it has told the service manager *line*."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while line not in self.notified:
            ready, _, _ = select.select([self._notify], [], [], 0.1)
            if ready:
                self.notified += self._notify.recv(65536).decode().splitlines()
            elif self.process.poll() is not None:
                message = f"daemon ended with {self.process.returncode}:\n{self.log.read_text()}"
                raise AssertionError(message)
            elif time.monotonic() > deadline:
                raise AssertionError(f"no {line}:\n{self.log.read_text()}")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, seconds: float = END_SECONDS) -> int:
        """Wait for its end; returns its status."""
        assert self.process is not None
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.process = None
        return status

    def stop(self) -> None:
        """Tell it to end and demand that it does so well."""
        self.signal()
        status = self.wait()
        assert status == 0, (status, self.log.read_text())

    def kill(self) -> None:
        """SIGKILL: it has no chance to tidy up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def rss(self) -> int:
        """Bytes of memory of its own process that are resident."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError

    def close(self) -> None:
        self._notify.close()


@contextmanager
def served(
    tmp_path: Path,
    *,
    home: Path | None = None,
    storage_options: tuple[str, ...] = SMALL,
    engine: str = "auto",
    check_log: bool = True,
    program: Sequence[str] = PROGRAM,
    **options: Any,
) -> Iterator[Daemon]:
    """A daemon that is ready; afterwards it is stopped, its pool let go, its engine ended.

    `docker=True`, `containerd=True` and `metrics=True` are served on sockets of the rig; every
    other option is one of `devmapper serve` with `_` for `-`: `stop_time="1s"`, `watch=False`.
    The graph is in *tmp_path* unless *home* says otherwise.  The pool is looked at by thin_check
    and, with *check_log*, the log must have no warning.
    """
    graph = home or tmp_path / "graph"
    with tempfile.TemporaryDirectory(prefix=f"dmt-{os.getpid()}-serve-", dir="/run") as directory:
        daemon = Daemon(graph, Path(directory), options, engine, program)
        daemon.command.options = storage_options
        try:
            daemon.start()
            yield daemon
            if daemon.process is not None:
                daemon.stop()
            if check_log:
                bad = [
                    line
                    for line in daemon.log.read_text().splitlines()
                    if any(word in line for word in (" WARNING ", " ERROR ", "Traceback"))
                ]
                assert bad == [], "\n".join(bad)
        except BaseException:
            print(daemon.log.read_text() if daemon.log.exists() else "no log")
            raise
        finally:
            if daemon.process is not None:
                daemon.kill()
            daemon.close()
            if (graph / "metadata").is_dir():
                daemon.command.stop()
    metadata = graph / "devicemapper" / "metadata"
    if metadata.exists() and not capabilities.tools():
        checked = thin_check(metadata)
        assert checked, checked.output
