"""Mounts, freezing, and who keeps a device busy, on the real kernel."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.linux import blockdev, files, loop, mount
from devmapper.linux.blockdev import DeviceNumber
from devmapper.linux.holders import devices_in_use, holders
from devmapper.linux.process import run
from devmapper.units import Bytes
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    files.make_sparse(tmp_path / "image", Bytes(32 * 1024 * 1024))
    with loop.attached(tmp_path / "image") as device:
        run(["mkfs.ext4", "-q", str(device)])
        yield device


@pytest.fixture
def point(tmp_path: Path) -> Path:
    path = tmp_path / "mount point"
    path.mkdir()
    return path


def test_a_mounted_device_is_found(device: Path, point: Path) -> None:
    with mount.mounted_at(device, point, "ext4", flags=mount.MountFlag.NOATIME, data="discard"):
        assert mount.mounted(point)
        (entry,) = mount.mounts_of(blockdev.device_number(device))
        assert mount.is_mount_of(point, entry.device)
        assert not mount.is_mount_of(point.parent, entry.device)
        assert not mount.is_mount_of(point / "missing", entry.device)
        assert (entry.mount_point, entry.fs_type, entry.source) == (point, "ext4", str(device))
        assert "noatime" in entry.options
        assert "discard" in entry.super_options
        assert loop.is_open_exclusively(device)
    assert not mount.mounted(point)
    assert not loop.is_open_exclusively(device)
    assert mount.mounts_of(blockdev.device_number(device)) == []


def test_a_bind_mount_is_a_mount_point_of_the_same_file_system(tmp_path: Path, point: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    mount.mount(source, point, None, flags=mount.MountFlag.BIND)
    try:
        assert not mount.mounted(point)
        assert mount.is_mount_point(point)
        assert mount.is_mount_root(point)
        link = tmp_path / "link"
        link.symlink_to(point)
        assert not mount.is_mount_root(link)
        (source / "below").mkdir()
        assert not mount.is_mount_root(point / "below")
    finally:
        mount.unmount(point)
    assert not mount.is_mount_point(point)
    assert not mount.is_mount_root(point)
    with pytest.raises(FileNotFoundError):
        mount.is_mount_root(tmp_path / "missing")


def test_making_a_directory_private_happens_once(point: Path) -> None:
    mount.make_private(point)
    try:
        mount.make_private(point)
        (entry,) = [entry for entry in mount.mountinfo() if entry.mount_point == point]
        assert entry.optional == ()
    finally:
        mount.unmount(point)
    assert not mount.is_mount_point(point)


def test_a_frozen_file_system_lets_writers_wait(device: Path, point: Path) -> None:
    with mount.mounted_at(device, point, "ext4"):
        with mount.frozen(point):
            with pytest.raises(OSError, match="FIFREEZE") as caught:
                mount.freeze(point)
            assert caught.value.errno == errno.EBUSY
            writer = subprocess.Popen(["touch", str(point / "file")])
            time.sleep(0.2)
            assert writer.poll() is None
        assert writer.wait(60) == 0
        assert (point / "file").exists()
        mount.freeze(point)
        mount.thaw(point)
        with pytest.raises(OSError, match="FITHAW") as caught:
            mount.thaw(point)
        assert caught.value.errno == errno.EINVAL


def test_a_busy_mount_names_its_holders(device: Path, point: Path) -> None:
    with mount.mounted_at(device, point, "ext4"):
        (point / "file").touch()
        with subprocess.Popen(["sleep", "30"], cwd=point) as user:
            try:
                with pytest.raises(OSError, match="umount") as caught:
                    mount.unmount(point)
                assert caught.value.errno == errno.EBUSY
                found = holders(device)
                assert f"mounted at {str(point)!r}" in found
                assert any(text.startswith(f"process {user.pid} (sleep) uses") for text in found)
            finally:
                user.kill()
    assert not [text for text in holders(device) if text.startswith("mounted")]


def test_a_mount_in_another_namespace_is_named(device: Path, point: Path) -> None:
    mount.mount(device, point, "ext4")
    try:
        # The child's copies are private: our unmount does not reach them
        user = subprocess.Popen(["unshare", "--mount", "sh", "-c", "echo ready; exec sleep 30"],
                                stdout=subprocess.PIPE)  # fmt: skip
        assert user.stdout is not None
        assert user.stdout.readline() == b"ready\n"
    finally:
        mount.unmount(point)
    try:
        assert mount.mounts_of(blockdev.device_number(device)) == []
        assert loop.is_open_exclusively(device)
        assert f"process {user.pid} (sleep) has it mounted in another mount namespace" in holders(
            device
        )
    finally:
        user.kill()
        user.wait()
        user.stdout.close()
    wait_for(lambda: not loop.is_open_exclusively(device))


def test_files_in_use_are_told_from_copies_of_a_mount(device: Path, point: Path) -> None:
    number = blockdev.device_number(device)
    other = DeviceNumber(number.major, (1 << 20) - 1)  # nobody's
    ready = "echo ready; exec sleep 600"
    with mount.mounted_at(device, point, "ext4"):
        for words, cwd, uses in (
            (["unshare", "--mount", "sh", "-c", ready], Path("/"), False),
            (["sh", "-c", ready], point, True),
            (["sh", "-c", f"exec 9>'{point}/file'; {ready}"], Path("/"), True),
        ):
            with subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE) as user:
                assert user.stdout is not None
                assert user.stdout.readline() == b"ready\n"
                try:
                    assert devices_in_use([other, number]) == ({number} if uses else set())
                finally:
                    user.kill()
        assert devices_in_use([other, number]) == set()
    assert devices_in_use([]) == set()


def test_an_open_block_device_has_a_holder(device: Path) -> None:
    with blockdev.opened(device, os.O_RDONLY):
        assert any(f"process {os.getpid()} " in text for text in holders(device))


def test_what_stands_on_files_of_a_device_is_named(device: Path, point: Path) -> None:
    with mount.mounted_at(device, point, "ext4"):
        files.make_sparse(point / "image", Bytes(1024 * 1024))
        (point / "swap").write_bytes(bytes(1024 * 1024))
        (point / "swap").chmod(0o600)
        run(["mkswap", "-q", str(point / "swap")])
        run(["swapon", str(point / "swap")])
        try:
            with loop.attached(point / "image") as node:
                found = holders(device)
        finally:
            run(["swapoff", str(point / "swap")])
        assert f"loop device {str(node)!r} on {str(point / 'image')!r}" in found
        assert f"swap on {str(point / 'swap')!r}" in found
        assert holders(device) == [f"mounted at {str(point)!r}"]


def test_a_loop_device_on_the_device_itself_is_named(device: Path) -> None:
    with loop.attached(device) as node:
        assert f"loop device {str(node)!r} on {str(device)!r}" in holders(device)
    assert [text for text in holders(device) if text.startswith("loop")] == []


def test_files_that_have_no_name_any_more_are_seen(device: Path, point: Path) -> None:
    """Mapped and deleted, in a mount that was detached: by the number of the device."""
    mount.mount(device, point, "ext4")
    try:
        (point / "program").write_bytes(Path("/bin/sleep").read_bytes())
        (point / "program").chmod(0o755)
        user = subprocess.Popen([str(point / "program"), "30"], cwd="/")
        (point / "program").unlink()
    finally:
        mount.unmount(point, flags=mount.UmountFlag.DETACH)
    try:
        assert any(text.startswith(f"process {user.pid} (program) has") for text in holders(device))
    finally:
        user.kill()
        user.wait()
    wait_for(lambda: not loop.is_open_exclusively(device))
    assert holders(device) == []
