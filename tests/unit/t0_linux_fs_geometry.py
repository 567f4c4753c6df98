"""Sizes of file systems as their superblocks have them; mkfs and resize2fs are the oracles."""

import subprocess
from pathlib import Path

import pytest

from devmapper.linux.fs_geometry import Geometry, geometry
from devmapper.linux.growfs import grow
from devmapper.units import KIB, MIB, Bytes


def make(path: Path, size: int, *command: str) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run([*command, path], check=True, capture_output=True)


def enlarge(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (8 * MIB, []),
        (64 * MIB, ["-b", "4096"]),
        (64 * MIB, ["-O", "^64bit", "-I", "128"]),
        (20 * 1024 * MIB, []),  # more than 2**32 bytes
    ],
)
def test_ext4(tmp_path, size, options):
    path = tmp_path / "image"
    make(path, size, "mkfs.ext4", "-q", *options)
    found = geometry(path)
    assert (found.fs_type, found.size) == ("ext4", size)
    assert found.fills(size)
    assert not found.fills(2 * size)


def test_xfs(tmp_path):
    path = tmp_path / "image"
    make(path, 300 * MIB, "mkfs.xfs", "-q", "-i", "maxpct=20")
    assert geometry(path) == Geometry("xfs", Bytes(4096), 76800, 0, 19200, 64, 20)


@pytest.mark.parametrize("block", [1 * KIB, 4 * KIB])
@pytest.mark.parametrize("more", [0, 1, 200 * KIB, 700 * KIB, 8 * MIB, 8 * MIB + 300 * KIB])
def test_what_resize2fs_makes_counts_as_grown(tmp_path, block, more):
    """It leaves a last group out that is too small: such a file system must not grow for ever."""
    path = tmp_path / "image"
    group = 8 * block * block
    make(path, group + block % 4096, "mkfs.ext4", "-q", "-b", str(block))
    before = geometry(path)
    enlarge(path, group + block + more)
    subprocess.run(["e2fsck", "-fp", path], check=True, capture_output=True)
    subprocess.run(["resize2fs", path], check=True, capture_output=True)
    after = geometry(path)
    assert after.fills(group + block + more)
    assert after.blocks >= before.blocks
    assert before.blocks_on(group + block + more) <= after.blocks
    assert not grow(path)


@pytest.mark.parametrize(
    ("blocks", "device", "expected"),
    [
        (1000, 1000, 1000),
        (1000, 1009, 1000),  # the rest is too small for a group
        (1000, 1010, 1010),
        (1005, 1009, 1009),  # it has begun this group already
        (950, 1009, 1000),
        (1000, 900, 1000),  # it is larger than its device: never shrunk
        (999, 1000, 1000),
    ],
)
def test_a_last_group_that_is_too_small_is_left_out(blocks, device, expected):
    found = Geometry("xfs", Bytes(4096), blocks, 0, 100, 10)
    assert found.blocks_on(device * 4096 + 4095) == expected


@pytest.mark.parametrize("magic", [b"XFSB", b""])
def test_what_makes_no_sense_is_refused(tmp_path, magic):
    path = tmp_path / "image"
    path.write_bytes(magic + bytes(200 * KIB))
    with pytest.raises(OSError, match=r"makes no sense|unknown kind"):
        geometry(path)


def test_an_ext4_that_was_in_use_grows(tmp_path):
    """resize2fs alone would ask for a check first."""
    path = tmp_path / "image"
    make(path, 8 * MIB, "mkfs.ext4", "-q")
    subprocess.run(["debugfs", "-w", "-R", "mkdir d", path], check=True, capture_output=True)
    enlarge(path, 40 * MIB)
    assert grow(path)
    assert geometry(path).size == 40 * MIB
    assert subprocess.run(["e2fsck", "-fn", path], capture_output=True).returncode == 0
    assert not grow(path)
