"""Ids of a user namespace: which ones a tar holds, and which ones are on disk."""

import io
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmapper.errors import ArchiveError, UsageError
from devmapper.layerdiff import tarformat
from devmapper.layerdiff.apply import apply
from devmapper.layerdiff.archive import write_diff
from devmapper.layerdiff.changes import changes
from devmapper.layerdiff.compression import Decompressed
from devmapper.layerdiff.copytree import copy_tree
from devmapper.layerdiff.ids import IDENTITY, OVERFLOW_ID, Ids
from devmapper.layerdiff.tarformat import Entry
from devmapper.layerdiff.tarreader import TarReader

END = bytes(1024)
IDS = Ids([(0, 100000, 1000), (1000, 5000, 1)], [(0, 200000, 65536)])
ACL = "system.posix_acl_access"
CAPABILITY = "security.capability"
ANY_ID = st.integers(0, 2**32 - 2)


def entry(name: str, kind: bytes = tarformat.REGULAR, **fields: Any) -> Entry:
    return Entry(name, kind, **{"mode": 0o755, **fields})


def unpack(root: Path, *entries: Entry, ids: Ids = IDS) -> None:
    apply(root, io.BytesIO(b"".join(map(tarformat.encode, entries)) + END), ids=ids)


def written(root: Path, old: Path | None = None, ids: Ids = IDS) -> dict[str, Entry]:
    out = io.BytesIO()
    write_diff(root, changes(root, old), out, ids=ids)
    out.seek(0)
    return {each.name: each for each in TarReader(Decompressed(out))}


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def acl(*entries: tuple[int, int, int]) -> bytes:
    words = (
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + held.to_bytes(4, "little")
        for tag, bits, held in entries
    )
    return (2).to_bytes(4, "little") + b"".join(words)


def named_acl(user: int | None, group: int | None) -> bytes:
    nobody = 2**32 - 1
    named = [] if user is None else [(0x02, 4, user)]
    named_group = [] if group is None else [(0x08, 5, group)]
    return acl(
        (0x01, 6, nobody), *named, (0x04, 4, nobody), *named_group,
        (0x10, 5, nobody), (0x20, 0, nobody),
    )  # fmt: skip


def capability(root: int | None) -> bytes:
    """cap_net_raw, permitted and effective; revision 3 if it is for the root of a namespace."""
    body = (1 << 13).to_bytes(4, "little") + bytes(12)
    if root is None:
        return b"\1\0\0\2" + body
    return b"\1\0\0\3" + body + root.to_bytes(4, "little")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


# -- translating ---------------------------------------------------------------------------------


@st.composite
def maps(draw: st.DrawFn) -> Sequence[tuple[int, int, int]]:
    """Ranges that overlap on neither side, each side in an order of its own; one begins with 0."""
    sizes = draw(st.lists(st.integers(1, 70000), max_size=5))
    inside, outside = {}, {}
    end = 0
    for number, size in enumerate(sizes):
        inside[number] = end
        end += size + draw(st.integers(0, 3))
    end = 0
    for number in draw(st.permutations(range(len(sizes)))):
        outside[number] = end + draw(st.sampled_from([0, 1, 1000, 100000]))
        end = outside[number] + sizes[number]
    return [
        (inside[number], outside[number], sizes[number])
        for number in draw(st.permutations(range(len(sizes))))
    ]


def some_id(draw: st.DrawFn, ranges: Sequence[tuple[int, int, int]]) -> int:
    if not ranges:
        return draw(ANY_ID)
    begin, _, size = draw(st.sampled_from(ranges))
    return begin + draw(st.one_of(st.integers(0, size - 1), st.sampled_from([0, size - 1])))


@given(st.data())
def test_what_goes_to_the_host_comes_back(data):
    uid_maps, gid_maps = data.draw(maps()), data.draw(maps())
    ids = Ids(uid_maps, gid_maps)
    uid, gid = (data.draw(st.composite(some_id)(each)) for each in (uid_maps, gid_maps))
    named = named_acl(uid, gid)
    before = entry("a", uid=uid, gid=gid, mode=0o6755, xattrs={ACL: named, "user.a": named})
    on_host = ids.on_host(before)
    assert ids.in_container(on_host) == (before, "")
    for ranges, inside, outside in ((uid_maps, uid, on_host.uid), (gid_maps, gid, on_host.gid)):
        if ranges:  # by the definition of user_namespaces(7)
            (hit,) = [each for each in ranges if each[0] <= inside < each[0] + each[2]]
            assert outside - hit[1] == inside - hit[0]
        else:
            assert outside == inside


@given(maps().filter(bool), ANY_ID)
def test_ids_are_in_a_map_or_nowhere(ranges, value):
    ids = Ids(ranges)
    inside = any(begin <= value < begin + size for begin, _, size in ranges)
    outside = any(begin <= value < begin + size for _, begin, size in ranges)
    if inside:
        assert ids.in_container(ids.on_host(entry("a", uid=value)))[0].uid == value
    else:
        with pytest.raises(ArchiveError, match=f"tar entry 'a': user id {value} is in none"):
            ids.on_host(entry("a", uid=value))
    translated, missing = ids.in_container(entry("a", uid=value, mode=0o6755))
    assert missing == ("" if outside else f"user id {value}")
    assert translated.mode == (0o6755 if outside else 0o755)
    assert outside or translated.uid == OVERFLOW_ID


def test_edges_of_ranges():
    def inside(uid: int) -> int:
        return IDS.in_container(entry("a", uid=uid, gid=200000))[0].uid

    assert [inside(uid) for uid in (100000, 100999, 5000)] == [0, 999, 1000]
    assert [inside(uid) for uid in (0, 999, 4999, 5001, 99999, 101000)] == [OVERFLOW_ID] * 6
    assert IDS.root == (100000, 200000)


def test_without_maps_nothing_is_touched():
    before = entry("a", uid=2**32 - 2, gid=5, xattrs={ACL: named_acl(1, 2)})
    assert IDENTITY.on_host(before) is before
    assert IDENTITY.in_container(before)[0] is before
    one_kind = Ids(gid_maps=[(0, 1000, 10)])
    found = one_kind.on_host(before)
    assert (found.uid, found.gid) == (2**32 - 2, 1005)


def test_maps_need_a_root():
    with pytest.raises(UsageError, match="have no root"):
        Ids([(1, 100000, 10)])


def test_names_in_access_lists_without_a_map():
    xattrs = {ACL: named_acl(3, 4), CAPABILITY: capability(7)}
    translated, missing = IDS.in_container(entry("a", uid=100000, gid=200000, xattrs=xattrs))
    assert missing == "user id 3"
    assert translated.xattrs == {ACL: named_acl(None, None)}
    for bad, words in (
        ({ACL: named_acl(3000, 4)}, "user id 3000"),
        ({ACL: named_acl(3, 70000)}, "group id 70000"),
        ({CAPABILITY: capability(1001)}, "user id 1001"),
    ):
        with pytest.raises(ArchiveError, match=words):
            IDS.on_host(entry("a", xattrs=bad))


@pytest.mark.parametrize("value", [b"", b"\2\0\0", b"\3\0\0\0" + bytes(8), acl((2, 4, 5))[:-1]])
def test_attributes_of_unknown_layout_stay(value):
    xattrs = {ACL: value, CAPABILITY: value}
    assert IDS.on_host(entry("a", xattrs=xattrs)).xattrs == xattrs


def test_capabilities():
    def inside(value: bytes) -> bytes | None:
        before = entry("a", uid=100000, gid=200000, xattrs={CAPABILITY: value})
        return IDS.in_container(before)[0].xattrs.get(CAPABILITY)

    assert inside(capability(100000)) == capability(None), "root of the container"
    assert inside(capability(100005)) == capability(5), "root of one inside of it"
    assert inside(capability(None)) == capability(None)
    for ours, on_disk in ((5, 100005), (0, 100000), (None, None)):
        found = IDS.on_host(entry("a", xattrs={CAPABILITY: capability(ours)}))
        assert found.xattrs == {CAPABILITY: capability(on_disk)}


# -- tars and trees ------------------------------------------------------------------------------


@pytest.mark.root
def test_a_tar_is_unpacked_for_the_container(root):
    unpack(
        root,
        entry("./", tarformat.DIRECTORY, uid=1, gid=2),
        entry("a/b/file", uid=999, gid=65535, mode=0o6755),
        entry("a/b/link", tarformat.HARD_LINK, link="a/b/file", uid=999, gid=65535),
        entry("a/sym", tarformat.SYMLINK, link="/x", uid=3, gid=4),
        entry("a/c", tarformat.DIRECTORY, uid=1000),
        entry("fifo", tarformat.FIFO, uid=5),
        entry(".wh..wh.plnk/1", uid=6),
        entry("plain", tarformat.HARD_LINK, link=".wh..wh.plnk/1"),
    )
    assert owner(root) == (100001, 200002)
    assert owner(root / "a") == owner(root / "a/b") == (100000, 200000), "not in the tar"
    assert (root / "a").stat().st_mode & 0o7777 == 0o755
    assert owner(root / "a/b/file") == (100999, 265535)
    assert (root / "a/b/file").stat().st_mode & 0o7777 == 0o6755
    assert owner(root / "a/sym") == (100003, 200004)
    assert owner(root / "a/c") == (5000, 200000)
    assert owner(root / "fifo") == (100005, 200000)
    assert owner(root / "plain") == (100006, 200000)


@pytest.mark.root
def test_missing_directories_of_a_group_that_is_inherited(root):
    os.chown(root, 1, 2)
    root.chmod(0o2755)
    unpack(root, entry("a/file"))
    assert owner(root / "a") == (100000, 200000)
    assert (root / "a").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"uid": 1001}, "user id 1001 is in none of the maps"),
        ({"gid": 65536}, "group id 65536 is in none of the maps"),
        ({"uid": 2**32 - 1}, "user id 4294967295 is out of range"),
    ],
)
def test_an_id_without_a_map_is_refused(root, wrong, words):
    with pytest.raises(ArchiveError, match=words):
        unpack(root, entry("a/file", **wrong))
    assert list(root.iterdir()) == []


def test_a_deletion_has_no_owner(root):
    (root / "gone").touch()
    unpack(root, entry(".wh.gone", uid=5000000), entry(".wh..wh.orph", uid=5000000))
    assert list(root.iterdir()) == []


@pytest.mark.root
def test_a_tar_holds_the_containers_ids(root, tmp_path, caplog):
    old = tmp_path / "old"
    old.mkdir()
    (old / "gone").touch()
    for name, ids in (("file", (100007, 200008)), ("own", (100000, 200000)), ("c", (5000, 200000))):
        (root / name).write_bytes(b"x")
        os.chown(root / name, *ids)
        (root / name).chmod(0o6755)
    os.link(root / "file", root / "link")
    with caplog.at_level(logging.WARNING):
        found = written(root, old)
    assert not caplog.records
    assert {name: (each.uid, each.gid) for name, each in found.items()} == {
        ".wh.gone": (0, 0),
        "c": (1000, 0),
        "file": (7, 8),
        "link": (7, 8),
        "own": (0, 0),
    }
    assert found["file"].mode == 0o6755


@pytest.mark.root
def test_owners_without_a_map_are_kept_as_nobody_with_one_warning(root, caplog):
    for number in range(3):
        (root / f"foreign{number}").write_bytes(b"x")
        os.chown(root / f"foreign{number}", number, 200001)
        (root / f"foreign{number}").chmod(0o4755)
    with caplog.at_level(logging.WARNING):
        found = written(root)
    assert [(each.uid, each.gid, each.mode, each.size) for each in found.values()] == [
        (OVERFLOW_ID, 1, 0o755, 1)
    ] * 3
    (record,) = caplog.records
    assert "'foreign0': user id 0 is in none of the maps" in record.getMessage()
    written(root)
    assert len(caplog.records) == 2, "one for each archive"


@pytest.mark.root
def test_a_tree_comes_back_from_its_tar(root, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (root / "d").mkdir()
    (root / "d/file").write_bytes(b"x")
    os.setxattr(root / "d/file", ACL, named_acl(100003, 200004))
    os.setxattr(root / "d/file", CAPABILITY, capability(100005))
    for path in (root / "d/file", root / "d"):
        capabilities = os.getxattr(path, CAPABILITY) if path.is_file() else b""
        os.chown(path, 100001, 200002)
        if capabilities:  # a change of the owner clears them
            os.setxattr(path, CAPABILITY, capabilities)
    out = io.BytesIO()
    write_diff(root, changes(root, None), out, ids=IDS)
    out.seek(0)
    apply(copy, out, ids=IDS)
    assert changes(copy, root) == []
    assert os.getxattr(copy / "d/file", ACL) == named_acl(100003, 200004)
    # in another namespace it is the same container
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out.seek(0)
    apply(elsewhere, out, ids=Ids([(0, 70000, 100)], [(0, 70000, 100)]))
    assert owner(elsewhere / "d/file") == (70001, 70002)
    assert os.getxattr(elsewhere / "d/file", ACL) == named_acl(70003, 70004)
    assert os.getxattr(elsewhere / "d/file", CAPABILITY) == capability(70005)


@pytest.mark.root
def test_a_copied_folder_is_as_its_tar(root, tmp_path):
    tree, unpacked = tmp_path / "tree", tmp_path / "unpacked"
    tree.mkdir()
    unpacked.mkdir()
    (tree / "d").mkdir()
    (tree / "d/file").write_bytes(b"x")
    (tree / "sym").symlink_to("x")
    os.link(tree / "d/file", tree / "link")
    for number, path in enumerate([tree, *sorted(tree.rglob("*"))]):
        os.chown(path, number, number + 1, follow_symlinks=False)
    copy_tree(tree, root, ids=IDS)
    tar = shutil.which("tar")
    assert tar is not None
    packed = subprocess.run(
        [tar, "-C", tree, "--format=pax", "-c", "."], check=True, stdout=subprocess.PIPE
    ).stdout
    apply(unpacked, io.BytesIO(packed), ids=IDS)
    assert changes(root, unpacked) == []
    assert owner(root) == owner(unpacked) == (100000, 200001)
    os.chown(tree / "d/file", 100000, 0)
    for path in (root / "d", root / "link", root / "sym"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ArchiveError, match="user id 100000 is in none"):
        copy_tree(tree, root, ids=IDS)
