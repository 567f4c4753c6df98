"""The private home inside a chroot into a plain directory, as fresh roots and builders are."""

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.root, pytest.mark.e2e]

PROGRAM = """
import encodings.ascii, os, sys
from contextlib import nullcontext
from pathlib import Path
from devmapper.deviceset import home
from devmapper.linux import mount

root, place = Path(sys.argv[1]), Path("/graph")
(root / "proc").mkdir()
(root / "graph").mkdir()
mount.mount("proc", root / "proc", "proc")
os.chroot(root)
os.chdir("/")
assert not home.is_bound_onto_itself(place)
private = home.PrivateHome(place, nullcontext)
private.pin()
assert home.is_bound_onto_itself(place)
home.release_home(place)
assert home.is_bound_onto_itself(place)
private.release()
assert not mount.is_mount_point(place)
"""


def test_the_bind_of_the_home_is_undone(tmp_path):
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", PROGRAM, tmp_path],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
