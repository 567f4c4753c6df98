"""Files: replacement, locks, holes."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from devmapper.linux import files
from devmapper.linux.files import FileLock
from devmapper.units import Bytes

KIB = 1024


def test_a_saved_file_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "record"
    files.save_file(path, b"old and long")
    with open(path, "rb") as reader:
        files.save_file(path, b"new", mode=0o640)
        assert reader.read() == b"old and long", "the old file was written to"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["record"]


def test_saving_fails_without_leftovers(tmp_path: Path) -> None:
    directory = tmp_path / "record"
    directory.mkdir()
    (directory / "content").touch()
    with pytest.raises(IsADirectoryError):
        files.save_file(directory, b"data")
    assert os.listdir(tmp_path) == ["record"]
    with pytest.raises(FileNotFoundError):
        files.save_file(tmp_path / "missing" / "record", b"data")


def test_a_temporary_name_is_one_that_docker_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        seen.extend(os.listdir(tmp_path))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    files.save_file(tmp_path / "record", b"data")
    assert len(seen) == 2, "file and directory are synced, in this order"
    assert seen[0].startswith(".tmp")
    assert seen[1] == "record"


def test_unlinking_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    files.unlink_durably(path)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        files.unlink_durably(path)
    files.unlink_durably(path, missing_ok=True)


def test_a_sparse_file_takes_no_space_until_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "data"
    files.make_sparse(path, Bytes(1 << 30))
    assert path.stat().st_size == 1 << 30
    assert path.stat().st_mode & 0o777 == 0o600
    assert files.allocated_bytes(path) < 64 * KIB
    assert files.is_sparse(path)
    with pytest.raises(FileExistsError):
        files.make_sparse(path, Bytes(1))
    assert path.stat().st_size == 1 << 30


def test_punching_and_zeroing(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 1024 * KIB)
    before = files.allocated_bytes(path)
    with open(path, "r+b") as file:
        fd = file.fileno()
        files.punch_hole(fd, 256 * KIB, 256 * KIB)
        assert os.pread(fd, 256 * KIB, 256 * KIB) == bytes(256 * KIB)
        assert os.pread(fd, 1, 256 * KIB - 1) == b"x"
        os.fsync(fd)
        assert files.allocated_bytes(path) < before
        try:
            files.zero_range(fd, 0, 128 * KIB)
        except OSError as err:
            assert err.errno == errno.EOPNOTSUPP  # noqa: PT017 - either result is right
        else:
            assert os.pread(fd, 128 * KIB + 1, 0) == bytes(128 * KIB) + b"x"
        assert path.stat().st_size == 1024 * KIB
        files.fallocate(fd, 1024 * KIB, 64 * KIB)
        assert path.stat().st_size == 1088 * KIB


def test_fallocate_errors_are_os_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file", "rb") as file, pytest.raises(OSError, match="fallocate") as caught:
        files.punch_hole(file.fileno(), 0, 4096)
    assert caught.value.errno == errno.EBADF


def test_the_file_system_is_named_as_docker_does(tmp_path: Path) -> None:
    known = {"extfs", "xfs", "tmpfs", "btrfs", "zfs", "f2fs", "<unknown>"}
    assert files.file_system_name(tmp_path) in known
    assert files.file_system_name(Path("/proc")) == "<unknown>"
    if Path("/dev/shm").is_mount():
        assert files.file_system_name(Path("/dev/shm")) == "tmpfs"
    assert files.file_system_free(tmp_path) > 0
    with pytest.raises(FileNotFoundError, match="statfs"):
        files.file_system_name(tmp_path / "missing")


def test_an_exclusive_lock_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with FileLock(path) as first:
        second = FileLock(path)
        with pytest.raises(BlockingIOError):
            second.acquire()
        with pytest.raises(BlockingIOError):
            second.acquire(shared=True, timeout=0.1)
        assert f"process {os.getpid()} (" in second.holder()
        with pytest.raises(OSError, match="already held"):
            first.acquire()
    second.acquire()
    second.release()
    second.release()
    assert not second.held


def test_shared_locks_go_together(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        files.locked(path, shared=True),
        files.locked(path, shared=True),
        pytest.raises(BlockingIOError),
        files.locked(path),
    ):
        pass
    with files.locked(path):
        pass


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = FileLock(path)
    holder.acquire()
    threading.Timer(0.2, holder.release).start()
    started = time.monotonic()
    with files.locked(path, timeout=60):
        assert time.monotonic() - started > 0.1


def test_a_lock_ends_with_its_process_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        "import sys; from pathlib import Path; from devmapper.linux.files import FileLock\n"
        "lock = FileLock(Path(sys.argv[1])); lock.acquire()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "src"},
        cwd=Path(__file__).parents[2],
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        lock = FileLock(path)
        with pytest.raises(BlockingIOError):
            lock.acquire()
        assert lock.holder().startswith(f"process {child.pid} (")
        child.kill()
        child.wait()
        lock.acquire(timeout=60)
        assert lock.holder().startswith(f"process {os.getpid()} (")
        lock.release()
        written = path.stat().st_mtime_ns
        lock.acquire()
        lock.release()
        assert path.stat().st_mtime_ns == written  # the name was there already
