"""Random writes over a mounted layer, verified by fio, while snapshots of it are taken."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from devmapper.driver import Driver, init
from devmapper.units import Bytes, ThinId
from tests.support import thin_tools

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.tools, pytest.mark.e2e]

SIZE_MIB = 96
CHECKS = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}


def start_fio(directory: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            "fio", "--name=job", f"--directory={directory}", f"--size={SIZE_MIB}M",
            "--rw=randwrite", "--bsrange=4k-128k", "--direct=1", "--ioengine=libaio",
            "--iodepth=8", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=64",
            "--time_based", "--runtime=5", "--output-format=json",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory,
    )  # fmt: skip


def check_file_system(driver: Driver, layer: str, fs_type: str) -> None:
    """The checker of the file system finds nothing."""
    info = driver.devices.dev_info(layer)
    pool = driver.devices.pool
    device = pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
    try:
        done = subprocess.run([*CHECKS[fs_type], str(device)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        pool.deactivate(info.name())


@pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
def test_random_writes_verify_while_snapshots_are_taken(tmp_path, fs_type):
    home = tmp_path / "graph"
    options = [f"dm.fs={fs_type}", "dm.basesize=512M", "dm.loopdatasize=4G",
               "dm.loopmetadatasize=32M"]  # fmt: skip
    with init(home, options, engine="embedded") as driver:
        driver.create("origin")
        root = Path(driver.get("origin"))
        fio = start_fio(root)
        snapshots: list[str] = []
        try:
            while fio.poll() is None and not (root / "job.0.0").exists():
                time.sleep(0.01)
            while fio.poll() is None and len(snapshots) < 12:
                number = len(snapshots)
                (root / "marker").write_text(str(number))
                driver.create(f"snap{number}", "origin")
                snapshots.append(f"snap{number}")
                time.sleep(0.35)
            output, _ = fio.communicate(timeout=120)
        finally:
            fio.kill()
            fio.wait()
        assert fio.returncode == 0, output
        job = json.loads(output[output.index("{") :])["jobs"][0]
        assert job["error"] == 0
        assert job["read"]["total_ios"] > 0, "nothing was verified"
        assert len(snapshots) >= 5

        for number, layer in enumerate(snapshots):
            if fs_type == "ext4":  # a frozen ext4 has an empty journal, a frozen xfs has not
                check_file_system(driver, layer, fs_type)
            tree = Path(driver.get(layer))
            assert (tree / "marker").read_text() == str(number)
            assert (tree / "job.0.0").stat().st_size <= SIZE_MIB << 20
            driver.put(layer)
            check_file_system(driver, layer, fs_type)
        driver.put("origin")
        for layer in [*snapshots, "origin"]:
            driver.remove(layer)
        assert driver.layers() == []
        driver.cleanup()
    checked = thin_tools.thin_check(home / "devicemapper" / "metadata")
    assert checked, checked.output
