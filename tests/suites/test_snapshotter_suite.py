"""containerd's own snapshotter suite on `devmapper serve`, each of its cases as a test here.

Every case has a daemon and a graph of its own.
"""

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import capabilities, go_suite
from tests.support.command import Command
from tests.support.thin_tools import thin_check

SOURCE = go_suite.GO_SOURCES / "github.com/containerd/containerd/snapshots/testsuite/testsuite.go"
CASES = (
    "Basic", "StatActive", "StatComitted", "TransitivityTest", "PreareViewFailingtest", "Update",
    "Remove", "Walk", "LayerFileupdate", "RemoveDirectoryInLowerLayer", "Chown",
    "DirectoryPermissionOnCommit", "RemoveIntermediateSnapshot", "DeletedFilesInChildSnapshot",
    "MoveFileFromLowerLayer", "Rename", "ViewReadonly", "StatInWalk", "CloseTwice",
    "RootPermission", "128LayersMount",
)  # fmt: skip
OPTIONS = ("dm.loopdatasize=1G", "dm.loopmetadatasize=16M", "dm.override_udev_sync_check=true")
EXT4 = ("dm.fs=ext4", "dm.basesize=64M")
XFS = ("dm.fs=xfs", "dm.basesize=300M")
SECONDS = 240

pytestmark = [pytest.mark.root, pytest.mark.go("snapshotter")]


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix=f"dmt-{os.getpid()}-", dir="/run") as folder:
        yield Path(folder)


def run_case(case: str, graph: Path, short: Path, engine: str, options: tuple[str, ...]) -> None:
    """One case; afterwards it has left nothing, and thin_check has the last word."""
    command = Command(graph, (*OPTIONS, *options), engine=engine)
    (short / "config.toml").touch()
    serve = command.argv(
        "serve", "--config", short / "config.toml", "--control-socket", short / "control",
        "--on-stop", "release", "--containerd-socket",
    )  # fmt: skip
    done = subprocess.run(
        [str(go_suite.build("snapshotter")), "-test.v", "-test.run", f"^TestSnapshotter$/^{case}$"],
        env={
            **os.environ,
            "TMPDIR": str(short),
            "SNAPSHOTTER_CMD": f"{shlex.join(serve)} {{sock}}",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=short,
        timeout=SECONDS,
    )
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    assert re.search(rf"^ *--- PASS: TestSnapshotter/{case} ", done.stdout, re.MULTILINE), said
    assert not re.search(r" (WARNING|ERROR) |Traceback", done.stderr), done.stderr
    metadata = graph / "devicemapper" / "metadata"
    if not capabilities.tools():
        checked = thin_check(metadata)
        assert checked, checked.output


def test_these_are_all_cases():
    if not SOURCE.exists():
        pytest.skip("containerd's source is not installed")
    assert re.findall(r't\.Run\("(\w+)"', SOURCE.read_text()) == list(CASES)


@pytest.mark.fuse
@pytest.mark.parametrize("case", CASES)
def test_embedded(case, tmp_path, short):
    run_case(case, tmp_path / "graph", short, "embedded", EXT4)


@pytest.mark.fuse
@pytest.mark.parametrize("case", ["Basic", "ViewReadonly", "RootPermission"])
def test_embedded_with_xfs(case, tmp_path, short):
    run_case(case, tmp_path / "graph", short, "embedded", XFS)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES)
def test_kernel(case, tmp_path, short):
    run_case(case, tmp_path / "graph", short, "kernel", EXT4)
