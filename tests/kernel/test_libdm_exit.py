"""The library outlives the interpreter: what it says at the end must not reach Python."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.root, pytest.mark.kernel]

# A device whose table is refused leaves the library with a node to care for, which it logs
PROGRAM = """
from devmapper.linux import libdm
try:
    with libdm.task(libdm.TaskKind.CREATE, "test-refused") as task:
        task.add_target(libdm.Target(0, 8, "linear", "/dev/null 0"))
        task.run()
except OSError:
    print("refused")
"""


def test_a_refused_device_does_not_crash_the_end_of_the_process():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
