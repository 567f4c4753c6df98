"""Archives that we write: what other programs read in them, and what files do meanwhile."""

import io
import os
import re
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from devmapper.errors import ArchiveError
from devmapper.layerdiff import tarformat
from devmapper.layerdiff.archive import write_diff, write_tree
from devmapper.layerdiff.changes import Change, Kind, changes
from devmapper.layerdiff.tarformat import Entry
from tests.support.trees import assert_trees_equal, snapshot_tree, tree_of_tar

T = 1_500_000_000
LONG = "long-" + "x" * 200
UNDECODABLE = os.fsdecode(b"not-utf8-\xff\xfe")


def has_user_xattrs(directory: Path) -> bool:
    try:
        os.setxattr(directory, "user.probe", b"")
        os.removexattr(directory, "user.probe")
    except OSError:
        return False
    return True


def make_tree(root: Path) -> Path:
    """One of each kind that needs no root, with names and times that are hard to store."""
    root.mkdir()
    (root / "etc").mkdir(mode=0o751)
    (root / "etc/passwd").write_bytes(b"root:x:0:0\n")
    (root / "etc/empty").touch(mode=0o600)
    (root / "etc/setuid").write_bytes(b"#!\n")
    (root / "etc/setuid").chmod(0o4755)
    os.link(root / "etc/passwd", root / "etc/a-link")
    (root / "bin").symlink_to("usr/bin")
    (root / ("link-" + "l" * 90)).symlink_to("/t" * 200)
    os.mkfifo(root / "fifo", 0o640)
    (root / LONG / LONG).mkdir(parents=True)
    (root / LONG / LONG / "näme").write_bytes(b"1" * 513)
    (root / UNDECODABLE).write_bytes(b"2" * 512)
    (root / LONG / UNDECODABLE).write_bytes(b"3")
    with open(root / "holes", "wb") as file:
        file.seek(3 << 20)
        file.write(b"data")
        file.truncate((5 << 20) + 17)
    if has_user_xattrs(root):
        os.setxattr(root / "etc/passwd", "user.a=b%", b"bin\0ary\n")
        os.setxattr(root / "etc", "user.dir", b"")
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        mtime = (T + number) * 1_000_000_000 + number % 3 * 123
        os.utime(path, ns=(0, mtime), follow_symlinks=False)
    return root


def archive_of(root: Path, path: Path) -> Path:
    with open(path, "wb") as out:
        write_tree(root, out)
    return path


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree")


def gnu_tar(*argv: str | Path) -> str:
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    done = subprocess.run(["tar", *argv], capture_output=True, env={**os.environ, "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, b"")
    return os.fsdecode(done.stdout)


def test_the_standard_library_reads_it(tree, tmp_path):
    assert_trees_equal(snapshot_tree(tree), tree_of_tar(archive_of(tree, tmp_path / "t.tar")))


def test_gnu_tar_lists_and_extracts_it(tree, tmp_path):
    archive = archive_of(tree, tmp_path / "t.tar")
    assert "holes" in gnu_tar("-tf", archive)
    out = tmp_path / "out"
    out.mkdir()
    gnu_tar("--xattrs", "--xattrs-include=*", "-xpf", archive, "-C", out)
    assert_trees_equal(tree, out)


def test_gnu_tar_has_nothing_to_say_about_a_difference(tree, tmp_path):
    (tmp_path / "old/etc").mkdir(parents=True)
    (tmp_path / "old/gone").touch()
    with open(tmp_path / "t.tar", "wb") as out:
        write_diff(tree, changes(tree, tmp_path / "old"), out)
    listed = gnu_tar("-tf", tmp_path / "t.tar").splitlines()
    assert {"etc/", "etc/passwd", ".wh.gone"} <= set(listed)


def test_the_order_and_the_names_are_dockers(tree, tmp_path):
    with tarfile.open(archive_of(tree, tmp_path / "t.tar")) as archive:
        raw = [member.name for member in archive]
    assert raw == sorted(raw, key=os.fsencode)
    listing = archive_of(tree, tmp_path / "t.tar").read_bytes()
    assert b"etc/\0" in listing
    assert b"./" not in listing
    assert not re.search(rb"(?m)^/", listing[:100])


def test_two_archives_of_a_tree_are_the_same_bytes(tree, tmp_path):
    one = archive_of(tree, tmp_path / "1.tar").read_bytes()
    assert one == archive_of(tree, tmp_path / "2.tar").read_bytes()
    assert one.endswith(bytes(1024))
    assert len(one) % 512 == 0


def test_deletions_are_whiteouts(tree, tmp_path):
    out = io.BytesIO()
    write_diff(tree, [Change("/etc", Kind.MODIFY), Change("/etc/gone", Kind.DELETE)], out)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        members = archive.getmembers()
    assert [(member.name, member.size) for member in members] == [("etc", 0), ("etc/.wh.gone", 0)]
    assert members[1].isreg()


def test_hard_links_are_kept_within_the_changes(tree):
    out = io.BytesIO()
    write_diff(tree, [Change("/etc/passwd", Kind.ADD)], out)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        assert archive.getmembers()[0].isreg()
    out = io.BytesIO()
    write_diff(tree, [Change("/etc/a-link", Kind.ADD), Change("/etc/passwd", Kind.ADD)], out)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        assert [(m.name, m.islnk(), m.linkname) for m in archive] == [
            ("etc/a-link", False, ""), ("etc/passwd", True, "etc/a-link"),
        ]  # fmt: skip


def test_sockets_are_left_out_but_hide_what_they_replaced(tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "s"))
    for kind, names in ((Kind.ADD, []), (Kind.MODIFY, [".wh.s"])):
        out = io.BytesIO()
        write_diff(root, [Change("/s", kind)], out)
        out.seek(0)
        with tarfile.open(fileobj=out) as archive:
            assert archive.getnames() == names


@pytest.mark.parametrize("name", [".wh.x", ".wh.", ".wh..wh..opq"])
@pytest.mark.parametrize("kind", [Kind.ADD, Kind.DELETE])
def test_a_name_that_reads_as_a_deletion_is_refused(tmp_path, name, kind):
    (tmp_path / name).touch()
    with pytest.raises(ArchiveError) as caught:
        write_diff(tmp_path, [Change(f"/{name}", kind)], io.BytesIO())
    assert caught.value.member == name


def test_a_file_that_vanishes_is_left_out_with_a_warning(tree, caplog):
    found = changes(tree, None)
    (tree / "etc/passwd").unlink()
    shutil.rmtree(tree / LONG)
    out = io.BytesIO()
    write_diff(tree, found, out)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        names = archive.getnames()
    assert "etc/passwd" not in names
    assert "etc/empty" in names
    assert "etc/passwd" in caplog.text


class _Meddler(io.BytesIO):
    """Changes a file as soon as its header was written."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__()
        self._path = path
        self._size = size

    def write(self, data):
        written = super().write(data)
        if b"victim" in bytes(data[:512]):
            os.truncate(self._path, self._size)
        return written


@pytest.mark.parametrize("size", [0, 5_000, 4_000_000])
def test_a_file_that_changes_its_size_leaves_a_whole_archive(tmp_path, size, caplog):
    root = tmp_path / "r"
    root.mkdir()
    (root / "victim").write_bytes(b"v" * 3_000_000)
    (root / "z").write_bytes(b"last")
    out = _Meddler(root / "victim", size)
    write_tree(root, out)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        assert archive.getnames() == ["victim", "z"]
        victim = archive.extractfile("victim")
        last = archive.extractfile("z")
        assert victim is not None
        assert last is not None
        content = victim.read()
        assert last.read() == b"last"
    kept = min(size, 3_000_000)
    assert content == b"v" * kept + bytes(3_000_000 - kept)
    assert ("shrunk" in caplog.text) is (size < 3_000_000)


def test_holes_are_not_read(tmp_path):
    class Counter(io.RawIOBase):
        total = 0

        def write(self, data):
            self.total += len(data)
            if self.total > 1 << 30:
                raise EOFError
            return len(data)

    root = tmp_path / "r"
    root.mkdir()
    with open(root / "f", "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"x")
    reads = []
    original = os.preadv

    def preadv(fd, buffers, offset):
        reads.append(offset)
        return original(fd, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(EOFError):
            write_tree(root, Counter())  # type: ignore[arg-type]
    assert reads == [1 << 29]


def test_a_raw_stream_that_takes_less_gets_all(tree, tmp_path):
    class Slow(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data[:1000]))

    out = Slow()
    write_tree(tree, out)
    assert out.getvalue() == archive_of(tree, tmp_path / "t.tar").read_bytes()


@pytest.mark.root
def test_devices_owners_and_capabilities(tmp_path):
    root = tmp_path / "r"
    root.mkdir()
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    os.mknod(root / "disk", 0o060660, os.makedev(259, 300_000))
    (root / "ping").touch(mode=0o755)
    os.chown(root / "ping", 3_000_000, 4_294_967_294)
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(root / "ping", "security.capability", capability)
    archive = archive_of(root, tmp_path / "t.tar")
    assert_trees_equal(snapshot_tree(root), tree_of_tar(archive))
    assert b"SCHILY.xattr.security.capability=" + capability in archive.read_bytes()


@pytest.mark.parametrize(
    "entry",
    [
        Entry("f", tarformat.REGULAR, size=8 << 30),
        Entry("f", tarformat.REGULAR, mtime_ns=-1),
        Entry("f", tarformat.REGULAR, mtime_ns=-1_500_000_000),
        Entry("f", tarformat.REGULAR, mtime_ns=0o77777777777 * 1_000_000_000 + 10**9),
        Entry("f", tarformat.REGULAR, mtime_ns=100_000_000),
        Entry("a/" * 80 + "b", tarformat.REGULAR),
        Entry("a" * 155 + "/" + "b" * 100, tarformat.REGULAR),
        Entry("a" * 156 + "/" + "b" * 100, tarformat.REGULAR),
        Entry("a" * 100 + "/", tarformat.DIRECTORY),
        Entry("d" * 254 + "/", tarformat.DIRECTORY),
        Entry("ü", tarformat.SYMLINK, link="ö" * 60),
        Entry(UNDECODABLE, tarformat.SYMLINK, link=UNDECODABLE * 20),
        Entry("f", tarformat.REGULAR, xattrs={"user.n": b"x" * 80}),
    ],
    ids=str,
)
def test_the_header_says_the_same_to_the_standard_library(entry):
    data = tarformat.encode(entry)
    assert len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as archive:
        member = archive.next()
    assert member is not None
    assert member.name == entry.name.rstrip("/")
    assert (member.type, member.size, member.linkname) == (entry.type, entry.size, entry.link)
    assert member.mtime == pytest.approx(entry.mtime_ns / 1e9)


def test_record_lengths_count_themselves():
    for size in range(1, 1200):
        entry = Entry("f", tarformat.REGULAR, xattrs={"k": b"v" * size})
        records = dict(tarformat.parse_pax(tarformat.encode(entry)[512:-512].rstrip(b"\0")))
        assert records == {"SCHILY.xattr.k": b"v" * size}
