"""Where inodes are: what debugfs and xfs_db say of the same image, and what is not understood."""

import random
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmapper.layerdiff.ext4_inodes import Ext4Inodes, read_ext4
from devmapper.layerdiff.inode_ranges import END_OF_INODES, ByteRange, InodeRange, InodeSet
from devmapper.layerdiff.xfs_inodes import XfsInodes, read_xfs
from devmapper.units import MIB


def make(path: Path, size: int, *command: str) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run([*command, path], check=True, capture_output=True)
    return path


def read(path: Path) -> Ext4Inodes:
    with path.open("rb") as file:
        found = read_ext4(file)
    assert found is not None
    return found


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def ext4_places(path: Path, inodes: list[int], block_size: int) -> dict[int, int]:
    """In bytes, as debugfs has them."""
    commands = "".join(f"imap <{inode}>\n" for inode in inodes)
    said = subprocess.run(
        ["debugfs", path], input=commands, capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"located at block (\d+), offset (0x[0-9a-f]+)", said)
    assert len(found) == len(inodes)
    return {
        inode: int(block) * block_size + int(offset, 16)
        for inode, (block, offset) in zip(inodes, found, strict=True)
    }


EXT4 = {
    "default": (300 * MIB, 4096, []),
    "small blocks": (100 * MIB, 1024, []),
    "32 bit": (300 * MIB, 4096, ["-O", "^64bit", "-I", "128"]),
    "no flex_bg": (400 * MIB, 4096, ["-O", "^flex_bg"]),
    "meta_bg": (1200 * MIB, 4096, ["-O", "meta_bg,^resize_inode"]),
    "meta_bg, small blocks": (600 * MIB, 1024, ["-O", "meta_bg,^resize_inode,^flex_bg"]),
    "sparse_super2": (400 * MIB, 1024, ["-O", "sparse_super2,meta_bg,^resize_inode"]),
    "large inodes": (200 * MIB, 4096, ["-I", "1024"]),
}


@pytest.mark.parametrize("name", EXT4)
def test_ext4_as_debugfs_has_it(tmp_path, name):
    size, block_size, options = EXT4[name]
    path = make(
        tmp_path / "image", size, "mkfs.ext4", "-q", "-b", str(block_size), "-E",
        "lazy_itable_init=1", *options,
    )  # fmt: skip
    places = read(path)
    last = places._superblock.inodes_per_group * places._superblock.groups
    chooser = random.Random(1)
    inodes = sorted({1, 2, 11, last, *(chooser.randrange(1, last) for _ in range(60))})
    length = places._superblock.bytes_per_inode
    for inode, offset in ext4_places(path, inodes, block_size).items():
        assert list(places.inodes_in([ByteRange(offset, offset + 1)])) == [
            InodeRange(inode, inode + 1)
        ]
        (last_byte,) = places.inodes_in([ByteRange(offset + length - 1, offset + length)])
        assert last_byte == (inode, inode + 1)


def test_ext4_inodes_of_a_range_are_all_that_touch_it(tmp_path):
    path = make(tmp_path / "image", 300 * MIB, "mkfs.ext4", "-q", "-b", "4096")
    places = read(path)
    chooser = random.Random(2)
    inodes = list(range(1, 3000, 7))
    at = ext4_places(path, inodes, 4096)
    for _ in range(30):
        begin = at[chooser.choice(inodes)] + chooser.randrange(-300_000, 300_000)
        end = begin + chooser.randrange(1, 200_000)
        found = InodeSet(places.inodes_in([ByteRange(max(begin, 0), end)]))
        for inode in inodes:
            assert (inode in found) == (at[inode] < end and at[inode] + 256 > begin)


def test_ext4_that_has_grown(tmp_path):
    old = make(tmp_path / "old", 300 * MIB, "mkfs.ext4", "-q", "-b", "4096")
    new = tmp_path / "new"
    new.write_bytes(old.read_bytes())
    with new.open("r+b") as file:
        file.truncate(700 * MIB)
    subprocess.run(["resize2fs", new], check=True, capture_output=True)
    ours, theirs = read(new), read(old)
    differing = InodeSet(ours.differing(theirs) or [])
    per_group = ours._superblock.inodes_per_group
    assert 2 not in differing
    assert 3 * per_group - 1 not in differing
    assert 3 * per_group + 1 in differing
    assert END_OF_INODES - 1 in differing
    assert theirs.differing(ours) == ours.differing(theirs)


def test_an_ext4_that_was_checked_is_another(tmp_path):
    old = make(tmp_path / "old", 20 * MIB, "mkfs.ext4", "-q")
    new = tmp_path / "new"
    new.write_bytes(old.read_bytes())
    assert read(new).differing(read(old)) is not None
    patch(new, 1024 + 0x40, b"\1\2\3\4")
    assert read(new).differing(read(old)) is None
    other = make(tmp_path / "other", 20 * MIB, "mkfs.ext4", "-q", "-I", "512")
    assert read(other).differing(read(old)) is None


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0x38, b"\0\0"),  # s_magic
        (0x18, b"\xff"),  # s_log_block_size
        (0x20, bytes(4)),  # s_blocks_per_group
        (0x28, bytes(4)),  # s_inodes_per_group
        (0x58, b"\1\0"),  # s_inode_size
        (0xFE, b"\1\0"),  # s_desc_size
        (0x61, b"\xff"),  # s_feature_incompat: mmp, … inline data
        (0x150, b"\xff\xff\xff\xff"),  # s_blocks_count_hi
    ],
)
def test_ext4_that_is_not_understood(tmp_path, offset, data):
    path = make(tmp_path / "image", 20 * MIB, "mkfs.ext4", "-q")
    patch(path, 1024 + offset, data)
    with path.open("rb") as file:
        assert read_ext4(file) is None


@pytest.mark.parametrize("options", ["inline_data", "casefold", "encrypt", "ea_inode"])
def test_features_that_hide_a_change_are_not_understood(tmp_path, options):
    path = make(tmp_path / "image", 20 * MIB, "mkfs.ext4", "-q", "-O", options)
    with path.open("rb") as file:
        assert read_ext4(file) is None


def xfs(path: Path) -> XfsInodes:
    with path.open("rb") as file:
        found = read_xfs(file)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "options",
    [[], ["-i", "size=1024"], ["-b", "size=1024"], ["-m", "crc=0"], ["-d", "agcount=7"]],
)
def test_xfs_as_xfs_db_has_it(tmp_path, options):
    path = make(tmp_path / "image", 600 * MIB, "mkfs.xfs", "-q", *options)
    places = xfs(path)
    sb = places._superblock
    chooser = random.Random(3)
    for _ in range(25):
        group = chooser.randrange(sb.groups)
        block = chooser.randrange(sb.group_blocks)
        inode = places._number(
            group, (block << sb.inodes_per_block_log) + chooser.randrange(sb.inodes_per_block)
        )
        said = subprocess.run(
            ["xfs_db", "-r", "-c", f"convert ino {inode} byte", path],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        (offset,) = map(int, re.findall(r"\((\d+)\)", said))
        for at in (offset, offset + sb.inode_size - 1):
            found = list(places.inodes_in([ByteRange(at, at + 1)]))
            assert found == [InodeRange(inode, inode + 1)]


def test_xfs_ranges_over_groups(tmp_path):
    path = make(tmp_path / "image", 600 * MIB, "mkfs.xfs", "-q", "-d", "agcount=6")
    places = xfs(path)
    whole = list(places.inodes_in([ByteRange(0, 600 * MIB)]))
    assert len(whole) == 6
    assert all(one.end <= other.begin for one, other in pairwise(whole))
    middle = list(places.inodes_in([ByteRange(99 * MIB, 201 * MIB)]))
    assert [end - begin for begin, end in middle] == [MIB // 512, 100 * MIB // 512, MIB // 512]


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, b"XFSA"), (4, bytes(4)), (84, bytes(4)), (100, b"\0\7"), (104, b"\0\7"), (216, b"\xff")],
)
def test_xfs_that_is_not_understood(tmp_path, offset, data):
    path = make(tmp_path / "image", 300 * MIB, "mkfs.xfs", "-q")
    patch(path, offset, data)
    with path.open("rb") as file:
        assert read_xfs(file) is None


def test_what_is_too_short(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"XFSB" + bytes(400))

    with path.open("rb") as file:
        assert read_ext4(file) is None
        assert read_xfs(file) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12))
def test_a_set_holds_what_its_ranges_hold(ranges):
    found = InodeSet(InodeRange(begin, begin + length) for begin, length in ranges)
    held = {number for begin, length in ranges for number in range(begin, begin + length)}
    assert {number for number in range(80) if number in found} == held
    assert "name" not in found
