"""In the guest: pytest's reports go out line by line (`-p tests.uml.reports`)."""

import json
import os

import pytest

LINE_VARIABLE = "UML_REPORTS"  # environment: the file that takes the lines
REPORT = "report"
RUNNING = "running"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Reports(config, os.environ[LINE_VARIABLE]))


class _Reports:
    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        # Nothing may seek in it: it is a serial line
        self._fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(RUNNING, nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook.pytest_report_to_serializable
        self._write(REPORT, hook(config=self._config, report=report))

    def _write(self, word: str, value: object) -> None:
        left = memoryview(f"{word} {json.dumps(value)}\n".encode())
        while left:
            left = left[os.write(self._fd, left) :]
