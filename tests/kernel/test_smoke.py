"""The kernel of the tests has thin pools: one made by hand, without a line of ours."""

import subprocess
from pathlib import Path

import pytest

from devmapper.linux import files, loop, mount
from devmapper.units import Bytes

pytestmark = [pytest.mark.root, pytest.mark.kernel]

MIB = 1024 * 1024
SECTOR = 512


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


def test_thin_device_holds_a_file_system(tmp_path: Path) -> None:
    metadata, data = tmp_path / "metadata", tmp_path / "data"
    files.make_sparse(metadata, Bytes(4 * MIB))
    files.make_sparse(data, Bytes(64 * MIB))
    with loop.attached(metadata) as metadata_node, loop.attached(data) as data_node:
        length = 64 * MIB // SECTOR
        table = f"0 {length} thin-pool {metadata_node} {data_node} 128 0 1 skip_block_zeroing"
        run("dmsetup", "create", "smoke-pool", "--table", table)
        try:
            run("dmsetup", "message", "smoke-pool", "0", "create_thin 0")
            thin = f"0 {length} thin /dev/mapper/smoke-pool 0"
            run("dmsetup", "create", "smoke-thin", "--table", thin)
            try:
                run("mkfs.ext4", "-q", "/dev/mapper/smoke-thin")
                point = tmp_path / "mounted"
                point.mkdir()
                with mount.mounted_at(Path("/dev/mapper/smoke-thin"), point, "ext4"):
                    (point / "file").write_text("kept")
                with mount.mounted_at(Path("/dev/mapper/smoke-thin"), point, "ext4"):
                    assert (point / "file").read_text() == "kept"
            finally:
                run("dmsetup", "remove", "smoke-thin")
        finally:
            run("dmsetup", "remove", "smoke-pool")
