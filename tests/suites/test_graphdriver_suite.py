"""Docker's own graph driver suite on `devmapper serve`, each of its cases as a test here.

Every case has a daemon and a graph of its own.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import go_suite
from tests.support.daemon import served
from tests.support.docker_plugin import mounted_layers
from tests.uml.boot import SCRATCH

CASES = (
    "Setup", "CreateEmpty", "CreateBase", "CreateSnap", "DeepLayerRead", "DiffApply", "Changes",
    "Status",
)  # fmt: skip
TOGETHER = {"Setup": "Teardown"}  # what the first has opened the second puts away
TIMERS = {"Timings", "LargeDiff"}  # they measure, and only when they are asked to
OPTIONS = ("dm.loopdatasize=1G", "dm.loopmetadatasize=16M", "dm.override_udev_sync_check=true")
EXT4 = ("dm.fs=ext4", "dm.basesize=64M")
XFS = ("dm.fs=xfs", "dm.basesize=300M")
SECONDS = 240

pytestmark = [pytest.mark.root, pytest.mark.tools, pytest.mark.go("graphdriver")]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """On a disk: thin_check reads with O_DIRECT, which the guest's tmpfs does not have."""
    if not SCRATCH.is_dir():
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(prefix="test-", dir=SCRATCH))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def run_case(case: str, folder: Path, engine: str, options: tuple[str, ...]) -> None:
    """One case; afterwards it has left nothing mounted, and thin_check has the last word."""
    work = folder / "work"
    work.mkdir()
    options = (*OPTIONS, *options)
    names = [case, TOGETHER[case]] if case in TOGETHER else [case]
    with served(folder, storage_options=options, engine=engine, docker=True) as daemon:
        done = subprocess.run(
            [
                str(go_suite.build("graphdriver")),
                "-test.v",
                "-test.run",
                f"^Test({'|'.join(names)})$",
            ],
            env={
                **os.environ,
                "TMPDIR": str(work),
                "PLUGIN_SOCK": str(daemon.docker),
                "GRAPH_OPTS": ",".join(options),  # they agree with the daemon's
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=work,
            timeout=SECONDS,
        )
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, said
        assert re.findall(r"^--- PASS: Test(\w+) ", done.stdout, re.MULTILINE) == names, said
        assert mounted_layers(daemon.home) == set()


def test_these_are_all_cases():
    sources = (go_suite.SUITES / "graphdriver").glob("*_test.go")
    found = re.findall(r"^func Test(\w+)\(", "".join(map(Path.read_text, sources)), re.MULTILINE)
    assert set(found) - TIMERS == {*CASES, *TOGETHER.values()}


@pytest.mark.fuse
@pytest.mark.parametrize("case", CASES)
def test_embedded(case, folder):
    run_case(case, folder, "embedded", EXT4)


@pytest.mark.fuse
@pytest.mark.parametrize("case", ["CreateSnap", "DiffApply", "Changes"])
def test_embedded_with_xfs(case, folder):
    run_case(case, folder, "embedded", XFS)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES)
def test_kernel(case, folder):
    run_case(case, folder, "kernel", EXT4)
