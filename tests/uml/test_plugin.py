"""The guest's tests in the host's report: what passed, failed, or never told its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import capabilities
from tests.uml.boot import CHECKOUT

pytestmark = pytest.mark.uml

CONFTEST = """
import os
from tests.uml.plugin import KernelTier

def pytest_configure(config):
    config.pluginmanager.register(KernelTier(config))
"""
SETTINGS = """
[pytest]
timeout = 300
markers =
    kernel: in the guest
    uml: in the guest
"""


def run_pytest(folder: Path, conftest: str, tests: str) -> tuple[int, dict[str, str], str]:
    """Run tests in a folder of their own; returns status, outcomes and all that was said."""
    (folder / "tests").symlink_to(CHECKOUT / "tests")
    (folder / "src").symlink_to(CHECKOUT / "src")
    (folder / "conftest.py").write_text(conftest)
    (folder / "pytest.ini").write_text(SETTINGS)
    (folder / "test_inner.py").write_text(tests)
    environment = {k: v for k, v in os.environ.items() if k != capabilities.KERNEL_TESTS}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--color=no", "-p", "no:cacheprovider",
         "test_inner.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines() if "test_inner.py::" in line]
    outcomes = {words[1].partition("::")[2]: words[0] for words in lines if words[0].isupper()}
    return done.returncode, outcomes, done.stdout + done.stderr


def test_each_test_is_reported_and_those_after_a_panic_have_failed(tmp_path: Path) -> None:
    status, outcomes, said = run_pytest(
        tmp_path,
        CONFTEST,
        """
import os, pytest
from pathlib import Path

@pytest.mark.kernel
def test_passes(tmp_path):
    assert "root=none" in Path("/proc/cmdline").read_text()

@pytest.mark.kernel
def test_fails():
    assert "inside" == "outside"

def test_runs_on_the_host():
    assert "root=none" not in Path("/proc/cmdline").read_text()

@pytest.mark.kernel
@pytest.mark.xfail(strict=True)
def test_expected(): assert False

@pytest.mark.kernel
def test_panics():
    Path("/proc/sysrq-trigger").write_text("c")

@pytest.mark.kernel
def test_never_runs(): pass
""",
    )
    assert status == 1, said
    assert outcomes == {
        "test_passes": "PASSED",
        "test_fails": "FAILED",
        "test_runs_on_the_host": "PASSED",
        "test_expected": "XFAIL",
        "test_panics": "FAILED",
        "test_never_runs": "FAILED",
    }, said
    assert "assert 'inside' == 'outside'" in said
    assert "Kernel panic - not syncing" in said
    assert said.splitlines()[-1].startswith("3 failed, 2 passed, 1 xfailed"), said


def test_a_guest_that_ends_otherwise_than_its_reports_say_is_an_error(tmp_path: Path) -> None:
    dies_late = """
def pytest_sessionfinish():
    if "UML_REPORTS" in os.environ:
        os._exit(9)
"""
    status, outcomes, said = run_pytest(
        tmp_path,
        CONFTEST + dies_late,
        "import pytest\n@pytest.mark.kernel\ndef test_passes(): pass\n",
    )
    assert status == 1, said
    assert outcomes["test_passes"] == "ERROR", said
    assert "the guest's pytest ended with status 9" in said
