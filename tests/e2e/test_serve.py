"""The daemon as a real process: it starts, ends, dies, and starts again."""

import signal
import subprocess

import pytest

from devmapper.server.lock import serving
from tests.support.daemon import served

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]


def test_starts_says_so_and_ends_when_told(tmp_path):
    with served(tmp_path) as daemon:
        assert any(line.startswith("STATUS=serving graph") for line in daemon.notified)
        assert serving(daemon.home) == daemon.control
        daemon.signal(signal.SIGHUP)
        daemon.signal(signal.SIGTERM)
        daemon.await_notice("STOPPING=1", 20)
        assert daemon.wait() == 0
        assert not daemon.control.exists()
        assert serving(daemon.home) is None


def test_a_second_daemon_is_refused_and_names_the_first(tmp_path):
    with served(tmp_path) as daemon:
        done = subprocess.run(daemon.argv(), capture_output=True, text=True)
        assert done.returncode == 4
        assert f"is in use by process {daemon.pid} (" in done.stderr
        assert len(done.stderr.splitlines()) == 2
        assert serving(daemon.home) == daemon.control
