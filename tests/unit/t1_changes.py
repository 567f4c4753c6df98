"""Differences of two trees: Docker's rules, and where ours are stronger on purpose."""

import errno
import os
import shutil
import socket
from pathlib import Path

import pytest

from devmapper.layerdiff.changes import Change, Kind, changes, diff_size
from devmapper.layerdiff.descent import Cursor, remove_tree

T = 1_500_000_000_000_000_000  # an instant without fraction
SECOND = 1_000_000_000


def put(path: Path, content: bytes = b"x", *, mtime: int = T) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(mtime, mtime))
    return path


def listed(new: Path, old: Path | None) -> list[tuple[str, str]]:
    return [(change.kind.name[0], change.path) for change in changes(new, old)]


@pytest.fixture
def old(tmp_path):
    root = tmp_path / "old"
    for name in ("etc/passwd", "etc/group", "usr/lib/a/one", "usr/lib/a/two", "usr/share/doc"):
        put(root / name)
    (root / "bin").symlink_to("usr/bin")
    return root


@pytest.fixture
def new(old, tmp_path):
    root = tmp_path / "new"
    shutil.copytree(old, root, symlinks=True)
    os.utime(root / "bin", ns=(T, T), follow_symlinks=False)
    os.utime(old / "bin", ns=(T, T), follow_symlinks=False)
    return root


def test_equal_trees_have_no_changes(old, new):
    assert changes(new, old) == []


def test_a_change_lists_all_directories_above_it(old, new):
    put(new / "usr/lib/a/one", b"more")
    assert listed(new, old) == [
        ("M", "/usr"), ("M", "/usr/lib"), ("M", "/usr/lib/a"), ("M", "/usr/lib/a/one"),
    ]  # fmt: skip


def test_a_deleted_directory_is_one_entry_and_an_added_one_is_listed_whole(old, new):
    shutil.rmtree(new / "usr/lib")
    put(new / "srv/www/index")
    assert listed(new, old) == [
        ("A", "/srv"), ("A", "/srv/www"), ("A", "/srv/www/index"),
        ("M", "/usr"), ("D", "/usr/lib"),
    ]  # fmt: skip


def test_the_order_is_that_of_the_bytes_of_paths(tmp_path):
    names = [b"a", b"a-b", b"a/c", b"\xc3\xa9", b"\xf0\x9f\x90\xb3", b"\xff"]
    root = os.fsencode(tmp_path)
    for name in (b"a", b"a-b"):
        os.mkdir(os.path.join(root, name))
    for name in (b"a/c", b"\xc3\xa9", b"\xf0\x9f\x90\xb3", b"\xff"):
        Path(os.fsdecode(os.path.join(root, name))).touch()
    assert [os.fsencode(change.path) for change in changes(tmp_path, None)] == [
        b"/" + name for name in names
    ]


def test_mode_of_a_directory_is_a_change_its_time_is_not(old, new):
    os.utime(new / "etc", ns=(0, 0))
    assert listed(new, old) == []
    (new / "etc").chmod(0o700)
    assert listed(new, old) == [("M", "/etc")]


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        (T, T + SECOND, True),
        (T, T + 5, False),  # one side came through an archive without fractions
        (T + 5, T, False),
        (T + 5, T + 6, True),
        (-SECOND, -SECOND + 7, False),
    ],
)
def test_times_are_equal_in_the_same_second_if_one_has_no_fraction(
    old, new, before, after, differs
):
    os.utime(old / "etc/passwd", ns=(before, before))
    os.utime(new / "etc/passwd", ns=(after, after))
    assert bool(changes(new, old)) is differs


def test_same_size_and_time_is_no_change_as_for_docker(old, new):
    put(new / "etc/passwd", b"y")
    assert changes(new, old) == []


def test_a_directory_that_becomes_a_file_is_one_change(old, new):
    shutil.rmtree(new / "usr/lib")
    put(new / "usr/lib")
    assert listed(new, old) == [("M", "/usr"), ("M", "/usr/lib")]


def test_a_file_that_becomes_a_directory_brings_its_content(old, new):
    (new / "etc/passwd").unlink()
    put(new / "etc/passwd/inside")
    assert listed(new, old) == [
        ("M", "/etc"), ("M", "/etc/passwd"), ("A", "/etc/passwd/inside"),
    ]  # fmt: skip


def test_target_of_a_symbolic_link_is_compared(old, new):
    (new / "bin").unlink()
    (new / "bin").symlink_to("usr/bix")
    os.utime(new / "bin", ns=(T, T), follow_symlinks=False)
    assert listed(new, old) == [("M", "/bin")]


def test_sockets_are_compared_exactly(tmp_path):
    """Docker's bit mask takes a socket for a directory and overlooks its time."""
    for side, mtime in (("old", T), ("new", T + SECOND)):
        (tmp_path / side).mkdir()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / side / "s"))
        os.utime(tmp_path / side / "s", ns=(mtime, mtime))
    assert listed(tmp_path / "new", tmp_path / "old") == [("M", "/s")]


def set_user_xattr(path: Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as err:
        if err.errno == errno.EOPNOTSUPP:
            pytest.skip("no extended attributes on this file system")
        raise


def test_every_extended_attribute_is_compared(old, new):
    set_user_xattr(new / "etc/passwd", "user.any", b"1")
    assert listed(new, old) == [("M", "/etc"), ("M", "/etc/passwd")]
    set_user_xattr(old / "etc/passwd", "user.any", b"1")
    assert listed(new, old) == []
    os.setxattr(old / "etc", "user.any", b"1")
    assert listed(new, old) == [("M", "/etc")]


@pytest.mark.root
def test_owner_and_device_number_are_compared(old, new):
    os.chown(new / "bin", 5, 6, follow_symlinks=False)
    for root, minor in ((old, 3), (new, 5)):
        os.mknod(root / "null", 0o020666, os.makedev(1, minor))
        os.utime(root / "null", ns=(T, T))
    assert listed(new, old) == [("M", "/bin"), ("M", "/null")]


def test_sizes_count_a_linked_file_once_and_no_directories(old, new):
    put(new / "etc/passwd", b"12345")
    put(new / "opt/big", b"1" * 1000)
    os.link(new / "opt/big", new / "opt/again")
    (new / "opt/link").symlink_to("12345678")
    (new / "etc/group").unlink()
    found = changes(new, old)
    assert diff_size(new, found) == 5 + 1000 + 8
    assert diff_size(new, [*found, Change("/not/there", Kind.ADD)]) == 1013


def make_deep(root: Path, depth: int, leaf: str) -> None:
    """A chain of directories whose path is far longer than PATH_MAX."""
    name = "d" * 50
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    file = os.open(leaf, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
    os.write(file, b"deep")
    os.close(file)
    os.close(fd)


def test_two_thousand_levels(tmp_path):
    try:
        for side in ("old", "new"):
            (tmp_path / side).mkdir()
            make_deep(tmp_path / side, 2000, side)
        found = changes(tmp_path / "new", tmp_path / "old")
        assert len(found) == 2002
        assert {change.kind for change in found[:2000]} == {Kind.MODIFY}
        assert [change.path[-4:] for change in found[2000:]] == ["/new", "/old"]
        assert diff_size(tmp_path / "new", found) == 4
    finally:
        fd = os.open(tmp_path, os.O_RDONLY)
        for side in ("old", "new"):
            remove_tree(side, dir_fd=fd)
        os.close(fd)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_moves_while_it_is_read_is_noticed(tmp_path):
    (tmp_path / "root/a/b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    with Cursor(tmp_path / "root") as cursor:
        cursor.enter("a")
        cursor.enter("b")
        (tmp_path / "root/a/b").rename(tmp_path / "elsewhere/b")
        with pytest.raises(OSError, match="moved") as caught:
            cursor.leave()
    assert caught.value.errno == errno.ESTALE


def test_a_root_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        changes(tmp_path / "none", None)
