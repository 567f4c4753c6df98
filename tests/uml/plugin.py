"""On the host: tests with the marker `kernel` run in guests and are reported one by one here.

The guests boot when the tests start and work beside the host's own tests; their tests come last
and take over the reports that a guest's pytest sends.  A test without a report has failed.  There
is one guest for the tests of the kernel engine itself, and one for whole programs on it, so that
neither waits for the other.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import capabilities
from tests.uml import reports
from tests.uml.boot import SCRATCH, Machine
from tests.uml.guest import Guest, LostKernel, running

MARKER: Final = "kernel"
_PASSED_ON: Final = ("MODEL_STEPS", "KILLS")  # environment: how long the long runs are
_UNLIMITED: Final = 3600.0  # seconds that a test without a time limit may be silent
_GRACE: Final = 60.0  # seconds beyond a test's own time limit until the guest counts as hung
_END: Final = 60.0  # seconds for the guest's pytest to end after its last test
_OUTPUT_TAIL: Final = 200  # pieces of what the guest's pytest prints
_ENGINE_TESTS: Final = Path(__file__).parents[1] / "kernel"


class Lost(Exception):
    """No report came, and none will come."""


class Reports:
    """The reports of a guest's tests as they come in; filled by the guest's thread."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._waiting: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
        self._last_sign = time.monotonic()
        self._ended = False

    def take(self, line: str | None) -> None:
        """Take what `running` hands on: a line of the guest, or None for its end."""
        word, _, rest = (line or "").partition(" ")
        data = json.loads(rest) if word == reports.REPORT else None
        with self._arrived:
            self._last_sign = time.monotonic()
            self._ended = line is None
            if data is not None:
                self._waiting[data["nodeid"]].append(data)
            self._arrived.notify_all()

    def next_of(self, nodeid: str, quiet: float) -> dict[str, Any]:
        """The next report of a test; `Lost` if nothing at all comes for *quiet* seconds."""
        with self._arrived:
            while not self._waiting[nodeid]:
                if self._ended:
                    raise Lost("the guest ended without a report of this test")
                left = self._last_sign + quiet - time.monotonic()
                if left <= 0:
                    raise Lost(f"nothing came from the guest for {quiet:.0f} seconds")
                self._arrived.wait(left)
            return self._waiting[nodeid].popleft()


class GuestTests:
    """The tests of one guest, in the order in which it runs them."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._config = config
        self._items = items
        self._reports = Reports()
        self._output: deque[bytes] = deque(maxlen=_OUTPUT_TAIL)
        self._guest: Guest | None = None
        self._quiet = max(map(self._limit, items)) + _GRACE
        self._failed = False
        self._lost = False

    def start(self, stack: ExitStack) -> None:
        """Boot the guest; it ends with *stack*."""
        self._guest = stack.enter_context(
            running(self._argv(), self._machine(), output=self._print, lines=self._reports.take)
        )

    def report(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The reports of one test as they come; after the last one, what is wrong with the end."""
        for report in self._reports_of(item):
            self._failed = self._failed or report.failed
            yield report
        if item is self._items[-1]:
            yield from self._end(item)

    def _argv(self) -> list[str]:
        option = self._config.option
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.uml.reports",
            "-p",
            "no:cacheprovider",
        ]
        words += [
            "--color=no",
            f"--maxfail={option.maxfail or 0}",
            f"--tb={option.tbstyle}",
            "-m",
            option.markexpr,
        ]
        words += ["-s"] if option.capture == "no" else []
        words += ["-v"] * option.verbose
        words += [f"--timeout={option.timeout}"] if option.timeout is not None else []
        return [*words, "--", *(item.nodeid for item in self._items)]

    def _machine(self) -> Machine:
        required = {*capabilities.required(), MARKER, "root"} - {"uml"}
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return Machine(
            disk=8 * 1024,
            cgroup=True,
            directory=self._config.rootpath,
            environment={
                **passed_on,
                reports.LINE_VARIABLE: "/dev/ttyS1",
                "REQUIRE": ",".join(sorted(required)),
                capabilities.KERNEL_TESTS: "here",
                # thin_check opens with O_DIRECT, which tmpfs does not know
                "TMPDIR": str(SCRATCH),
            },
        )

    def _limit(self, item: pytest.Item) -> float:
        """The seconds that a test may take; several things may set them."""
        marker = item.get_closest_marker("timeout")
        chosen = marker.args[0] if marker and marker.args else self._config.option.timeout
        return float(chosen or self._config.getini("timeout") or _UNLIMITED)

    def _print(self, piece: bytes) -> None:
        self._output.append(piece)
        if self._config.option.capture == "no":
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()

    def _reports_of(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        restore = self._config.hook.pytest_report_from_serializable
        while True:
            try:
                data = self._reports.next_of(item.nodeid, self._quiet)
            except Lost as err:
                yield self._failure(item, str(err), "call")
                return
            if isinstance(data["longrepr"], list):
                data["longrepr"] = tuple(data["longrepr"])  # a skip's; JSON knows no tuples
            report = restore(config=self._config, data=data)
            yield report
            if report.when == "teardown":
                return

    def _end(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """After the last test: the guest's pytest has to agree with its reports."""
        assert self._guest is not None
        if self._lost:
            return
        try:
            status = self._guest.wait(_END)
        except LostKernel as err:
            yield self._failure(item, str(err), "teardown")
            return
        if status != int(self._failed):
            yield self._failure(item, f"the guest's pytest ended with status {status}", "teardown")

    def _failure(self, item: pytest.Item, why: str, when: Any) -> pytest.TestReport:
        """A report of our own for what the guest did not report."""
        assert self._guest is not None
        sections = []
        if not self._lost:  # once: the rest was lost with it
            self._lost = True
            self._guest.kill()
            printed = b"".join(self._output).decode(errors="replace")
            sections = [("guest's pytest", printed), ("guest's console", self._guest.console())]
        return pytest.TestReport(
            nodeid=item.nodeid, location=item.location, keywords={}, outcome="failed",
            longrepr=why, when=when, sections=sections,
        )  # fmt: skip


class KernelTier:
    """The pytest plugin; registered by tests/conftest.py."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._guests: list[GuestTests] = []
        self._mine: dict[str, GuestTests] = {}
        self._stack = ExitStack()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if capabilities.kernel_tests_run_here():
            return
        mine = [item for item in items if item.get_closest_marker(MARKER)]
        for item in mine:
            item.add_marker("uml")
        if capabilities.uml():
            return  # each is left out with this reason, as tests of other tiers are
        groups: tuple[list[pytest.Item], list[pytest.Item]] = ([], [])
        for item in mine:
            groups[_ENGINE_TESTS not in item.path.parents].append(item)
        for group in filter(None, groups):
            guest = GuestTests(self._config, group)
            self._guests.append(guest)
            self._mine.update({item.nodeid: guest for item in group})
        others = [item for item in items if item.nodeid not in self._mine]
        items[:] = [*others, *groups[0], *groups[1]]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        if session.testsfailed or self._config.option.collectonly:
            return
        for guest in self._guests:
            guest.start(self._stack)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        guest = self._mine.get(item.nodeid)
        if guest is None:
            return None
        # Both watch the test where it runs; here they would strike while we wait for it
        faulthandler.cancel_dump_traceback_later()
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in guest.report(item):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item) -> bool | None:
        return True if item.nodeid in self._mine else None

    def pytest_sessionfinish(self) -> None:
        self._stack.close()
