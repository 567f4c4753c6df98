"""What a test leaves in the kernel is named and taken away; udevd is there for who wants it."""

import subprocess
from pathlib import Path

import pytest

from devmapper.linux import files
from devmapper.units import Bytes
from tests.support import kernel_state

pytestmark = [pytest.mark.root, pytest.mark.kernel]


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def test_all_that_is_left_is_named_and_taken_away(udevd: None, tmp_path: Path) -> None:
    before = kernel_state.held()
    backing, point = tmp_path / "backing", tmp_path / "mounted"
    files.make_sparse(backing, Bytes(32 << 20))
    point.mkdir()
    node = run("losetup", "--find", "--show", str(backing))
    run("dmsetup", "create", "lower", "--table", f"0 65536 linear {node} 0")
    run("dmsetup", "create", "upper", "--table", "0 65536 linear /dev/mapper/lower 0")
    run("mkfs.ext4", "-q", "/dev/mapper/upper")
    run("mount", "/dev/mapper/upper", str(point))
    run("dmsetup", "udevcreatecookie")

    left = kernel_state.left_since(before, settling=0)
    assert sorted(thing.kind for thing in left) == ["device"] * 2 + ["loop", "mount", "semaphore"]
    assert {thing.name for thing in left} >= {"lower", "upper", node, str(point)}

    kernel_state.take_away(left)
    assert kernel_state.left_since(before) == []


def test_a_node_without_a_device_counts(tmp_path: Path) -> None:
    before = kernel_state.held()
    node = Path("/dev/mapper/gone")
    node.symlink_to("../dm-77")
    left = kernel_state.left_since(before, settling=0)
    kernel_state.take_away(left)
    assert [str(thing) for thing in left] == ["node gone"]
    assert kernel_state.left_since(before) == []


def test_udevd_makes_the_nodes(udevd: None) -> None:
    run("dmsetup", "create", "ours", "--table", "0 8 error")
    # A link to the node is udev's work, a node of its own is libdevmapper's
    linked = Path("/dev/mapper/ours").is_symlink()
    run("dmsetup", "remove", "ours")
    assert linked
    assert not Path("/dev/mapper/ours").is_symlink()
    assert run("dmsetup", "udevcookies").splitlines()[1:] == []
