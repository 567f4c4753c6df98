"""The FUSE export with loop devices, file systems and other people's tools on it."""

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devmapper.engine.embedded.export import clear_stale
from devmapper.linux import blockdev, loop, mount
from devmapper.linux.process import run
from tests.support.export_server import BLOCK_SIZE, ExportServer
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse]

MIB = 1024 * 1024


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ExportServer]:
    mountpoint = tmp_path / "export"
    mountpoint.mkdir()
    with ExportServer(mountpoint) as server:
        yield server


@contextmanager
def fails_with(*numbers: int) -> Iterator[None]:
    """The block ends with an `OSError` of one of these errnos."""
    with pytest.raises(OSError, check=lambda error: error.errno in numbers):
        yield


def test_files_show_their_targets(server: ExportServer) -> None:
    server.ask("add_memory", "thin-1", 8 * MIB)
    server.ask("add_memory", "thin-2", 4 * MIB)
    found = (server.mountpoint / "thin-1").stat()
    assert (found.st_size, found.st_mode, found.st_uid) == (8 * MIB, 0o100600, 0)
    assert sorted(os.listdir(server.mountpoint)) == ["thin-1", "thin-2"]
    assert os.statvfs(server.mountpoint / "thin-1").f_bsize == BLOCK_SIZE
    with pytest.raises(FileNotFoundError):
        (server.mountpoint / "thin-3").stat()
    with fails_with(errno.EEXIST):
        server.ask("add_memory", "thin-1", MIB)
    with pytest.raises(PermissionError):
        os.truncate(server.mountpoint / "thin-1", 0)
    with fails_with(errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
        (server.mountpoint / "other").touch()


def test_many_names_are_all_listed(server: ExportServer) -> None:
    names = [f"{number:03}-{'x' * 200}" for number in range(120)]
    for name in names:
        server.ask("add_memory", name, BLOCK_SIZE)
    assert sorted(os.listdir(server.mountpoint)) == names


def test_a_file_is_read_and_written_like_a_disk(server: ExportServer) -> None:
    server.ask("add_memory", "disk", 2 * MIB)
    path = server.mountpoint / "disk"
    fd = os.open(path, os.O_RDWR)
    try:
        pattern = bytes(range(256)) * 8192
        assert os.pwrite(fd, pattern, 0) == len(pattern)
        assert os.pread(fd, 3 * MIB, 0) == pattern
        assert os.pread(fd, 4096, 2 * MIB) == b""
        assert os.pread(fd, 8192, 2 * MIB - 512) == pattern[-512:]
        assert os.pwrite(fd, b"abc" * 500, 1021) == 1500
        assert os.pread(fd, 1502, 1020) == pattern[1020:1021] + b"abc" * 500 + pattern[2521:2522]
        with fails_with(errno.ENOSPC):
            os.pwrite(fd, bytes(512), 2 * MIB)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert server.ask("calls", "disk")["flush"] == 1


def test_errors_of_the_target_reach_the_caller(server: ExportServer) -> None:
    server.ask("add_memory", "disk", MIB)
    with blockdev.opened(server.mountpoint / "disk", os.O_RDWR) as fd:
        for how, expected in (
            (str(errno.ENOSPC), errno.ENOSPC),
            (str(errno.EROFS), errno.EROFS),
            ("bug", errno.EIO),
            ("bug", errno.EIO),
        ):
            server.ask("fail", "disk", how)
            with fails_with(expected):
                os.pwrite(fd, bytes(4096), 0)
        server.ask("fail", "disk", "")
        assert os.pwrite(fd, bytes(4096), 0) == 4096


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_file_system_on_a_loop_device_keeps_its_data(
    server: ExportServer, tmp_path: Path, kind: str
) -> None:
    if kind == "memory":
        server.ask("add_memory", "disk", 64 * MIB)
    else:
        with open(tmp_path / "data", "wb") as file:
            file.truncate(64 * MIB)
        server.ask("add_file", "disk", str(tmp_path / "data"))
    point = tmp_path / "mnt"
    point.mkdir()
    with loop.attached(server.mountpoint / "disk") as device:
        assert loop.status(device).direct_io
        run(["mkfs.ext4", "-q", str(device)])
        with mount.mounted_at(device, point, "ext4"):
            # fmt: off
            run([
                "fio", "--name=verify", f"--filename={point}/file", "--size=16M", "--rw=randwrite",
                "--bsrange=4k-256k", "--ioengine=libaio", "--direct=1", "--iodepth=16",
                "--verify=crc32c", "--do_verify=1", "--verify_state_save=0",
            ])
            # fmt: on
        run(["e2fsck", "-f", "-n", str(device)])


def test_discards_unmap_and_flushes_arrive(server: ExportServer, tmp_path: Path) -> None:
    server.ask("add_memory", "disk", 32 * MIB)
    point = tmp_path / "mnt"
    point.mkdir()
    with loop.attached(server.mountpoint / "disk") as device:
        granularity = Path(f"/sys/block/{device.name}/queue/discard_granularity").read_text()
        assert int(granularity) == BLOCK_SIZE
        run(["mkfs.ext4", "-q", str(device)])
        with mount.mounted_at(device, point, "ext4"):
            before = server.ask("mapped", "disk")
            (point / "file").write_bytes(os.urandom(8 * MIB))
            with blockdev.opened(point, os.O_RDONLY) as fd:
                os.fsync(fd)
            os.sync()
            assert server.ask("mapped", "disk") >= before + 8 * MIB // BLOCK_SIZE
            assert server.ask("calls", "disk")["flush"] > 0
            (point / "file").unlink()
            os.sync()
            run(["fstrim", str(point)])
            assert server.ask("mapped", "disk") <= before + 8
        blockdev.discard(device)
        assert server.ask("mapped", "disk") == 0
        with open(device, "rb") as file:
            assert file.read(MIB) == bytes(MIB)
        with open(device, "wb") as file:
            file.write(os.urandom(MIB))
        run(["blkdiscard", "--zeroout", "--offset", "0", "--length", str(MIB), str(device)])
        assert server.ask("calls", "disk")["write_zeroes"] > 0
        assert server.ask("mapped", "disk") == MIB // BLOCK_SIZE
        with open(device, "rb") as file:
            assert file.read(MIB) == bytes(MIB)


def test_a_blocked_target_stops_no_other(server: ExportServer) -> None:
    server.ask("add_memory", "stuck", 16 * MIB)
    server.ask("add_memory", "free", 16 * MIB)
    with (
        loop.attached(server.mountpoint / "stuck") as stuck,
        loop.attached(server.mountpoint / "free") as free,
    ):
        server.ask("block", "stuck")
        # fmt: off
        writers = subprocess.Popen(
            ["fio", "--name=stuck", f"--filename={stuck}", "--size=16M", "--rw=randwrite",
             "--bs=4k", "--ioengine=libaio", "--direct=1", "--iodepth=128", "--verify=crc32c",
             "--do_verify=1", "--verify_state_save=0"],
            stdout=subprocess.DEVNULL,
        )
        # fmt: on
        try:
            wait_for(lambda: server.ask("calls", "stuck").get("write", 0) >= 4)
            with open(free, "wb") as file:
                file.write(os.urandom(8 * MIB))
                file.flush()
                os.fsync(file.fileno())
            (server.mountpoint / "free").stat()
            assert server.ask("threads") < 40, "one device holds too many threads"
            assert writers.poll() is None
            server.ask("unblock", "stuck")
            assert writers.wait(30) == 0
        finally:
            server.ask("unblock", "stuck")
            if writers.poll() is None:
                writers.kill()
                writers.wait()
        (server.mountpoint / "free").stat()
        for _ in range(2000):
            (server.mountpoint / "free").stat()
        wait_for(lambda: server.ask("threads") <= 8)


def test_an_open_file_is_not_removed(server: ExportServer) -> None:
    server.ask("add_memory", "disk", 4 * MIB)
    with loop.attached(server.mountpoint / "disk"):
        assert server.ask("open_count", "disk") == 1
        with fails_with(errno.EBUSY):
            server.ask("remove", "disk", 0.1)
        assert (server.mountpoint / "disk").stat().st_size == 4 * MIB
    server.ask("remove", "disk", 2.0)
    assert server.ask("names") == []
    assert os.listdir(server.mountpoint) == []
    with fails_with(errno.ENOENT):
        server.ask("remove", "disk", 0.1)


def test_a_target_grows_under_its_loop_device(server: ExportServer) -> None:
    server.ask("add_memory", "disk", 4 * MIB)
    with loop.attached(server.mountpoint / "disk") as device:
        server.ask("grow", "disk", 8 * MIB)
        assert (server.mountpoint / "disk").stat().st_size == 8 * MIB
        loop.set_capacity(device)
        assert blockdev.size(device) == 8 * MIB
        with open(device, "r+b") as file:
            file.seek(7 * MIB)
            file.write(b"x" * MIB)
        assert server.ask("mapped", "disk") == MIB // BLOCK_SIZE


def test_a_killed_server_leaves_nothing_that_hangs(tmp_path: Path) -> None:
    mountpoint = tmp_path / "export"
    mountpoint.mkdir()
    point = tmp_path / "mnt"
    point.mkdir()
    with ExportServer(mountpoint) as server:
        server.ask("add_memory", "disk", 32 * MIB)
        device = loop.attach(mountpoint / "disk")
        try:
            run(["mkfs.ext4", "-q", str(device)])
            mount.mount(device, point, "ext4")
            (point / "file").write_bytes(bytes(MIB))
            server.kill()
            with fails_with(errno.ENOTCONN, errno.ECONNABORTED):
                mountpoint.stat()
            with fails_with(errno.EIO), open(device, "rb") as file:
                file.seek(20 * MIB)
                file.read(4096)
            with fails_with(errno.EBUSY):
                loop.detach(device)
        finally:
            if mount.mounts_of(blockdev.device_number(device)):
                mount.unmount(point)
            loop.detach(device, timeout=60)
        assert loop.find_status(device) is None
        assert clear_stale(mountpoint)
        assert not mount.is_mount_point(mountpoint)
        assert not clear_stale(mountpoint)
    with ExportServer(mountpoint) as server:
        server.ask("add_memory", "disk", MIB)
        assert not clear_stale(mountpoint)
        assert os.listdir(mountpoint) == ["disk"]


def test_closing_ends_even_a_used_export(server: ExportServer) -> None:
    server.ask("add_memory", "disk", 4 * MIB)
    gone = (errno.ENOTCONN, errno.ECONNABORTED)
    # The last close fails too: it tells the server, which is gone
    with fails_with(*gone), blockdev.opened(server.mountpoint / "disk", os.O_RDONLY) as fd:
        assert server.process is not None
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.process.wait(60) == 0
        assert not mount.is_mount_point(server.mountpoint)
        with fails_with(errno.ENOTCONN, errno.ECONNABORTED):
            os.pread(fd, 4096, 0)


def test_a_server_killed_in_the_middle_of_io_lets_go(tmp_path: Path) -> None:
    mountpoint = tmp_path / "export"
    mountpoint.mkdir()
    with ExportServer(mountpoint) as server:
        server.ask("add_memory", "disk", 32 * MIB)
        with loop.attached(mountpoint / "disk") as device:
            # fmt: off
            load = subprocess.Popen(
                ["fio", "--name=load", f"--filename={device}", "--size=32M", "--rw=randrw",
                 "--bs=16k", "--ioengine=libaio", "--direct=1", "--iodepth=32", "--time_based",
                 "--runtime=20"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            # fmt: on
            try:
                wait_for(lambda: server.ask("calls", "disk").get("write", 0) > 100)
                os.kill(server.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
                assert load.wait(60) != 0
            finally:
                if load.poll() is None:
                    load.kill()
                    load.wait()
        assert clear_stale(mountpoint)
