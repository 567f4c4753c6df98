"""What stands on a device or a file, and how large it is."""

import errno
from pathlib import Path

import pytest

from devmapper.linux import blockdev, loop

_LENGTH = 0x10048


def image(path: Path, *parts: tuple[int, bytes], length: int = _LENGTH) -> Path:
    content = bytearray(length)
    for offset, magic in parts:
        content[offset : offset + len(magic)] = magic
    path.write_bytes(content)
    return path


BTRFS = (0x10040, b"_BHRfS_M")
EXT4 = (0x438, b"\x53\xef")
XFS = (0, b"XFSB")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([BTRFS], "btrfs"),
        ([EXT4], "ext4"),
        ([XFS], "xfs"),
        ([XFS, EXT4], "ext4"),
        ([XFS, EXT4, BTRFS], "btrfs"),
    ],
)
def test_the_first_magic_in_dockers_order_wins(
    tmp_path: Path, parts: list[tuple[int, bytes]], expected: str
) -> None:
    assert blockdev.probe_fs_type(image(tmp_path / "image", *parts)) == expected


def test_no_magic_and_short_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="unknown kind of file system") as caught:
        blockdev.probe_fs_type(image(tmp_path / "empty"))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="short read: 65607 bytes of 65608") as caught:
        blockdev.probe_fs_type(image(tmp_path / "short", XFS, length=_LENGTH - 1))
    assert caught.value.errno == errno.EIO
    with pytest.raises(FileNotFoundError):
        blockdev.probe_fs_type(tmp_path / "missing")


def test_a_regular_file(tmp_path: Path) -> None:
    path = image(tmp_path / "file")
    assert blockdev.size(path) == _LENGTH
    assert not blockdev.is_block_device(path)
    assert not blockdev.is_block_device(tmp_path / "missing")
    blockdev.flush(path)
    with pytest.raises(OSError, match="device") as caught:
        blockdev.device_number(path)
    assert caught.value.errno == errno.ENOTBLK
    with pytest.raises(OSError, match="BLKDISCARD") as caught:
        blockdev.discard(path)
    assert caught.value.filename == str(path)


def test_a_file_without_loop_device(tmp_path: Path) -> None:
    assert loop.find_by_backing_file(image(tmp_path / "file")) == []
    assert loop.find_status(Path("/dev/loop-missing")) is None
