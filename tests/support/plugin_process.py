"""Docker's plugin in a process of its own, to be killed: `python -m tests.support.plugin_process`.

Options follow `HOME SOCKET ENGINE`; `-v` first logs everything.  SIGTERM ends it as the daemon
ends: what is mounted stays.
"""

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import devmapper
from devmapper.cli.settings import preference
from devmapper.server.docker.service import DockerPlugin
from devmapper.server.operations import Operations

_START_SECONDS = 60.0


def main(home: str, socket: str, engine: str, *options: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    ended = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    with devmapper.init(home, options, engine=preference(engine)) as driver:
        plugin = DockerPlugin(driver, Path(socket), Operations())
        plugin.start()
        print("ready", flush=True)
        signal.sigwait(ended)
        plugin.stop()


class PluginProcess:
    """The process, started again as often as a test wants."""

    def __init__(self, home: Path, socket: Path, engine: str, options: tuple[str, ...]) -> None:
        self.home = home
        self.socket = socket
        self.log = home.with_name(f"{home.name}.log")
        self._words = [str(home), str(socket), engine, *options]
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        assert self._process is None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, *self._words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.kill()
            raise AssertionError(self.log.read_text())

    def terminate(self) -> None:
        """SIGTERM; requests under way end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with process:
            process.send_signal(number)
            status = process.wait(_START_SECONDS)
        assert status in (0, -number, 1 if number == signal.SIGKILL else 0), self.log.read_text()


@contextmanager
def serving(
    home: Path, socket: Path, options: tuple[str, ...], *, engine: str = "auto"
) -> Iterator[PluginProcess]:
    """A process that serves the graph in *home*; at the end it is gone, the graph is as it is."""
    served = PluginProcess(home, socket, engine, options)
    served.start()
    try:
        yield served
    finally:
        served.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
