"""File systems that grow, mounts that nobody sees, and the kernel's log, on the real kernel."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.errors import ToolError
from devmapper.linux import blockdev, growfs, loop, mount, process, xfs
from devmapper.linux.detached import mounted_detached
from devmapper.linux.fs_geometry import geometry
from devmapper.linux.kmsg import kernel_log
from devmapper.linux.process import run
from devmapper.units import MIB

pytestmark = [pytest.mark.root, pytest.mark.fuse]

MAKE = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"]}
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}


@pytest.fixture(params=["ext4", "xfs"])
def fs_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device(tmp_path: Path, fs_type: str) -> Iterator[Path]:
    """A file system of 300 MiB on a device of 620 MiB."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(300 * MIB)
    run([*MAKE[fs_type], str(image)])
    os.truncate(image, 620 * MIB)
    with loop.attached(image) as device:
        yield device


def test_it_grows_with_its_files(device: Path, fs_type: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with mount.mounted_at(device, place, fs_type):
        (place / "file").write_bytes(b"content" * 1000)
    assert growfs.grow(device)
    assert geometry(device).size == 620 * MIB
    assert not growfs.grow(device)
    with mount.mounted_at(device, place, fs_type):
        assert (place / "file").read_bytes() == b"content" * 1000
        found = os.statvfs(place)
        assert found.f_blocks * found.f_frsize > 500 * MIB
    run([*CHECK[fs_type], str(device)])


def test_mounted_growth_runs_no_program(
    device: Path, fs_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is allowed, the ioctl does it; where it is not, e2fsck is asked."""

    def refuse(argv: list[str], **_: object) -> None:
        raise ToolError(argv, 99, "a program was run")

    monkeypatch.setattr(process, "run", refuse)
    if fs_type == "ext4" and not has_cap_sys_resource():
        with pytest.raises(ToolError, match="e2fsck"):
            growfs.grow(device)
    else:
        assert growfs.grow(device)
        assert geometry(device).size == 620 * MIB


def has_cap_sys_resource() -> bool:
    (line,) = re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    return bool(int(line, 16) >> 24 & 1)


def test_an_xfs_beside_its_origin(device: Path, fs_type: str, tmp_path: Path) -> None:
    """As with a snapshot: its UUID is mounted already."""
    if fs_type != "xfs":
        assert growfs.grow(device)
        return
    origin = tmp_path / "origin"
    with origin.open("wb") as file:
        file.truncate(300 * MIB)
    run(["mkfs.xfs", "-q", "-m", f"uuid={uuid_of(device)}", str(origin)])
    place = tmp_path / "place"
    place.mkdir()
    with loop.attached(origin) as other, mount.mounted_at(other, place, "xfs"):
        assert growfs.grow(device)
    assert geometry(device).size == 620 * MIB


def uuid_of(device: Path) -> str:
    done = run(["blkid", "-o", "value", "-s", "UUID", str(device)])
    return done.stdout.decode().strip()


def test_nobody_sees_a_detached_mount(device: Path, fs_type: str) -> None:
    with mounted_detached(device, fs_type) as root:
        fd = os.open("f", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=root)
        os.close(fd)
        assert mount.mounts_of(blockdev.device_number(device)) == []
        assert loop.is_open_exclusively(device)
    assert not loop.is_open_exclusively(device)


def test_a_detached_mount_ends_with_its_process(device: Path, fs_type: str) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from devmapper.linux.detached import mounted_detached\n"
        "with mounted_detached(pathlib.Path(sys.argv[1]), sys.argv[2]):\n"
        "    print('mounted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, device, fs_type], capture_output=True)
    assert (done.returncode, done.stdout) == (-9, b"mounted\n")
    assert not loop.is_open_exclusively(device)
    assert growfs.grow(device)


def test_what_cannot_be_mounted_is_an_error_with_its_number(device: Path, fs_type: str) -> None:
    unknown = mounted_detached(device, fs_type, flags=["no_such_option"])
    with pytest.raises(OSError, match="no_such_option") as caught, unknown:
        pass
    assert caught.value.errno == errno.EINVAL
    no_fs = mounted_detached(device, "nofs")
    with pytest.raises(OSError, match="fsopen nofs") as caught, no_fs:
        pass
    assert caught.value.errno == errno.ENODEV
    assert not loop.is_open_exclusively(device)


def test_a_file_system_in_use_does_not_grow(device: Path, fs_type: str, tmp_path: Path) -> None:
    """Its mount elsewhere is the same file system, which grows; unmounted tools refuse it."""
    place = tmp_path / "place"
    place.mkdir()
    with mount.mounted_at(device, place, fs_type):
        try:
            growfs.grow(device)
        except (ToolError, OSError):
            assert geometry(device).size == 300 * MIB
    growfs.grow(device)
    assert geometry(device).size == 620 * MIB


def test_the_kernel_tells_why_a_mount_failed(device: Path, fs_type: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    name = xfs.kernel_name(device)
    assert name == device.name
    with kernel_log() as said:
        assert said.about(name) == ""
        with pytest.raises(OSError, match="mount"):
            mount.mount(device, place, fs_type, data="no_such_option")
        assert "no_such_option" in said.about(name, fs_type)
    with kernel_log() as said:
        assert said.about(name, fs_type) == "", "only what was said meanwhile"
        short = tmp_path / "short"
        shutil.copyfile(tmp_path / "image", short)
        os.truncate(short, 100 * MIB)
        with loop.attached(short) as other:
            with pytest.raises(OSError, match="mount"):
                mount.mount(other, place, fs_type)
            told = said.about(other.name)
            assert f"({other.name})" in told
            assert len(told) <= 256
            assert f"({device.name})" not in told


def test_retries_of_an_xfs(device: Path, fs_type: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with mount.mounted_at(device, place, fs_type):
        knob = Path("/sys/fs/xfs", device.name, "error/metadata/ENOSPC/max_retries")
        if fs_type == "xfs":
            xfs.set_enospc_retries(device, 3)
            assert knob.read_text() == "3\n"
        else:
            with pytest.raises(OSError, match="retries") as caught:
                xfs.set_enospc_retries(device, 3)
            assert caught.value.errno == errno.ENOTSUP
    assert blockdev.size(device) == 620 * MIB
