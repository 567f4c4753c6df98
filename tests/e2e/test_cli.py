"""The command on a real machine: every command, several at a time, everything that is wrong."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from devmapper.linux import loop
from devmapper.thin import format as layout
from devmapper.thin.blocks import FileDevice
from devmapper.thin.checksum import seal
from devmapper.thin.metadata import PoolMetadata
from tests.support import thin_tools
from tests.support.command import SMALL, Command, commands
from tests.support.daemon import served
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]


@pytest.fixture(params=["direct", "daemon"])
def dm(request, tmp_path):
    """The command, which opens the graph itself or goes through the daemon that holds it."""
    if request.param == "direct":
        with commands(tmp_path / "home") as command:
            yield command
    else:
        with served(tmp_path, home=tmp_path / "home") as daemon:
            yield daemon.command


# What nobody does while a daemon holds the graph, such as stopping the engine
direct = pytest.mark.parametrize("dm", ["direct"], indirect=True)


def tar_of(*members: "tuple[str, bytes] | tarfile.TarInfo", compression: str = "") -> bytes:
    """An archive of (name, content) files and of whole TarInfo members."""
    raw = io.BytesIO()
    mode: Any = f"w:{compression}"
    with tarfile.open(fileobj=raw, mode=mode) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    return info


# What works


def test_a_layer_from_its_making_to_its_removal(dm):
    assert dm("create", "debian").out == b""
    assert dm("exists", "debian").out == b""
    assert dm.run("exists", "other")[:2] == (1, b"")
    root = Path(dm("get", "debian").text.strip())
    (root / "etc").mkdir()
    (root / "etc/hostname").write_text("debian\n")
    (root / "issue").write_text("old\n")
    dm("put", "debian")
    assert not root.exists()

    dm("create", "web", "--parent", "debian")
    root = Path(dm("get", "web").text.strip())
    assert dm("get", "web").text.strip() == str(root)
    (root / "etc/hostname").write_text("web\n")
    (root / "srv").write_bytes(b"x" * 1_000_000)
    (root / "issue").unlink()
    assert dm("changes", "web", "--parent", "debian").text.splitlines() == [
        "C /etc", "C /etc/hostname", "D /issue", "A /srv",
    ]  # fmt: skip
    dm("create", "snapshot", "--parent", "web")
    (root / "late").write_text("not in the snapshot")
    dm("put", "web")

    archive = dm("diff", "snapshot", "--parent", "debian").out
    with tarfile.open(fileobj=io.BytesIO(archive)) as listed:
        names = listed.getnames()
    assert names == ["etc", "etc/hostname", ".wh.issue", "srv"]

    dm("create", "copy", "--parent", "debian")
    dm("apply", "copy", "--parent", "debian", stdin=archive)
    assert dm("changes", "copy", "--parent", "snapshot").out == b""

    dm("rm", "web", "snapshot", "copy")
    assert [each["id"] for each in dm("--json", "ls").json] == ["base", "debian"]


def test_what_is_printed_for_people(dm):
    dm("create", "a")
    dm("create", "b", "--parent", "a")
    dm("get", "b")
    lines = dm("ls").text.splitlines()
    assert lines[0].split() == ["ID", "SIZE", "MAPPED", "EXCLUSIVE", "SHARED", "STATE", "OWNER"]
    assert [(line.split()[0], *line.split()[-2:]) for line in lines[1:]] == [
        ("base", "-", "-"), ("a", "-", "-"), ("b", "mounted", "-"),
    ]  # fmt: skip
    info = dm("info").text.splitlines()
    assert info[0] == "Storage Driver: devicemapper"
    assert info[1].startswith(" Pool Name: docker-")
    assert " Engine: embedded" in info
    assert " Mode: rw" in dm("pool", "status").text
    assert " Id: b" in dm("inspect", "b").text
    assert " Active Devices: 1" in dm("engine", "status").text
    dm("put", "b")


def test_json_has_stable_keys(dm):
    assert dm("--json", "create", "a").json == {"id": "a", "parent": ""}
    path = dm("--json", "get", "a").json["path"]
    keys = [
        "id", "device_id", "size", "mapped", "exclusive", "shared", "active", "mounted",
        "owner", "snapshot",
    ]  # fmt: skip
    listed = dm("--json", "ls").json
    assert [list(each) for each in listed] == [keys, keys]
    assert listed[1]["mounted"] is True
    found = dm("--json", "inspect", "a").json
    assert list(found) == [
        *keys, "transaction_id", "initialized", "device_name", "device_path", "mount_point",
    ]  # fmt: skip
    assert path.startswith(found["mount_point"])
    assert found["device_path"].startswith("/dev/loop")
    assert list(dm("--json", "info").json) == ["driver", "root", "engine", "layers", "status"]
    assert list(dm("--json", "pool", "status").json) == [
        "name", "engine", "mode", "needs_check", "transaction_id", "block_size", "data", "metadata",
        "data_file", "metadata_file", "data_file_allocated",
    ]  # fmt: skip
    engine = dm("--json", "engine", "status").json
    assert list(engine) == ["engine", "version", "pool", "running", "process", "log", "devices"]
    assert engine["running"] is True
    os.kill(engine["process"], 0)
    assert [device["path"] for device in engine["devices"]] == [found["device_path"]]
    assert dm("--json", "exists", "a").json == {"id": "a", "exists": True}
    Path(path, "file").write_text("12345")
    assert dm("--json", "changes", "a").json == [{"path": "/file", "kind": "add"}]
    assert dm("--json", "put", "a").json == {"id": "a"}
    assert dm("--json", "rm", "a").json == {"removed": ["a"], "put_off": []}
    assert dm("--json", "pool", "check").json["clean"] is True


@direct
def test_json_of_an_engine_that_stops(dm):
    dm("create", "a")
    pool = dm("--json", "engine", "status").json["pool"]
    assert dm("--json", "engine", "stop").json == {"pool": pool, "stopped": True}
    assert dm("--json", "engine", "status").json["running"] is False


def test_import_of_archives_of_every_compression(dm, tmp_path):
    files = ("bin/sh", b"#!"), ("etc/passwd", b"root")
    for layer in ("plain", "gz", "bz2", "xz"):
        archive = tmp_path / layer
        archive.write_bytes(tar_of(*files, compression=layer.replace("plain", "")))
        expected = {"id": layer, "parent": "", "size": 6}
        assert dm("--json", "import", layer, archive).json == expected
        listed = dm("changes", layer).text.splitlines()
        assert listed == ["A /bin", "A /bin/sh", "A /etc", "A /etc/passwd"]
    assert dm("--json", "engine", "status").json["devices"] == []


def test_import_from_standard_input_and_of_a_directory(dm, tmp_path):
    dm("import", "a", "-", stdin=tar_of(("one", b"1")))
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/two").write_text("2")
    dm("import", "b", tree, "--parent", "a")
    assert dm("changes", "b", "--parent", "a").text.splitlines() == ["A /sub", "A /sub/two"]
    root = Path(dm("get", "b").text.strip())
    assert (root / "one").read_text() == "1"
    dm("put", "b")


def test_names_of_files_that_are_no_text(dm):
    dm("create", "a")
    root = dm("get", "a").text.strip()
    Path(os.fsdecode(root.encode() + b"/bad\xff")).touch()
    Path(root, "line\nbreak").touch()
    assert dm("changes", "a").out == b"A /bad\xff\nA /line\\nbreak\n"
    assert dm("--json", "changes", "a").json[0] == {"path": "/bad\\xff", "kind": "add"}
    dm("put", "a")


def test_diff_into_a_file(dm, tmp_path):
    dm("import", "a", "-", stdin=tar_of(("one", b"1")))
    target = tmp_path / "out.tar"
    assert dm("--json", "diff", "a", "-o", target).json["size"] == target.stat().st_size
    assert target.read_bytes() == dm("diff", "a").out


def test_pool_grows_while_a_layer_is_mounted(dm):
    dm("create", "a")
    dm("get", "a")
    before = dm("--json", "pool", "status").json["data"]["total"]
    after = dm("--json", "pool", "resize", "2G").json["data"]["total"]
    assert (before, after) == (1 << 30, 2 << 30)
    assert "cannot shrink" in dm.fails(2, "pool", "resize", "1G")
    assert "loop files" in dm.fails(2, "pool", "resize")
    grown = dm("--json", "pool", "resize", "--metadata", "3G").json
    assert (grown["data"]["total"], grown["metadata"]["total"]) == (2 << 30, 3 << 30)
    dm("put", "a")


@direct
def test_check_and_dump_of_the_pool_in_use_and_at_rest(dm):
    dm("create", "a")
    root = Path(dm("get", "a").text.strip())
    (root / "file").write_bytes(os.urandom(1 << 20))
    assert dm("pool", "check").text.endswith(": no damage\n")
    dm("put", "a")
    dump = dm("pool", "dump").text
    dm("engine", "stop")
    assert dm("pool", "dump").text == dump
    assert dm("pool", "check").text.endswith(": no damage\n")
    assert dm("--json", "engine", "status").json["running"] is False
    assert thin_tools.thin_dump(dm.home / "devicemapper/metadata") == dump


@direct
def test_engine_does_not_stop_under_a_mounted_layer_unless_forced(dm):
    dm("create", "a")
    root = Path(dm("get", "a").text.strip())
    (root / "file").write_text("kept")
    assert "is busy" in dm.fails(12, "engine", "stop")
    assert (root / "file").read_text() == "kept"
    dm("engine", "stop", "--force")
    assert dm("--json", "engine", "status").json["running"] is False
    root = Path(dm("get", "a").text.strip())
    assert (root / "file").read_text() == "kept"
    dm("put", "a")
    dm("engine", "stop")
    dm("engine", "stop")


@direct
def test_layers_survive_a_killed_engine(dm):
    dm("import", "a", "-", stdin=tar_of(("one", b"1")))
    os.kill(dm("--json", "engine", "status").json["process"], signal.SIGKILL)
    dm("create", "b", "--parent", "a")
    assert dm("changes", "b").text == "A /one\n"


# Several at a time


def test_twenty_commands_at_the_same_time(dm):
    dm("create", "base0")

    def life(number):
        name = f"layer{number}"
        dm("create", name, "--parent", "base0")
        path = Path(dm("get", name).text.strip())
        (path / "own").write_text(name)
        dm("put", name)
        if number % 2:
            dm("rm", name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(life, range(20)))
    kept = sorted(f"layer{number}" for number in range(0, 20, 2))
    assert sorted(each["id"] for each in dm("--json", "ls").json) == sorted(
        ["base", "base0", *kept]
    )
    for name in kept[:3]:
        path = Path(dm("get", name).text.strip())
        assert (path / "own").read_text() == name
        dm("put", name)


@direct
def test_first_commands_at_the_same_time_make_one_graph(dm):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: dm("create", name), "abcd"))
    assert [each["id"] for each in dm("--json", "ls").json] == ["base", "a", "b", "c", "d"]


def test_of_two_that_make_the_same_layer_one_is_told_no(dm):
    dm("create", "a")
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda _: dm.run("create", "b", "--parent", "a"), range(4)))
    assert sorted(ended.status for ended in ends) == [0, 11, 11, 11]


@direct
def test_sizes_of_their_own(dm):
    dm("create", "a")
    dm("create", "b", "--parent", "a", "--size", "1.5 G")
    dm("create", "c", "--parent", "b")
    sizes = {each["id"]: each["size"] for each in dm("--json", "ls").json}
    assert sizes == {"base": 256 << 20, "a": 256 << 20, "b": 3 << 29, "c": 3 << 29}
    found = os.statvfs(dm("get", "c").text.strip())
    assert found.f_blocks * found.f_frsize > 1 << 30
    dm("put", "c")
    message = dm.fails(2, "create", "d", "--parent", "b", "--size", "1G")
    assert message == (
        f"layer of {1 << 30} bytes is smaller than its parent 'b', which has {3 << 29} bytes"
    )
    assert "smaller than the base layer" in dm.fails(2, "ls", options=("dm.basesize=1M",))
    assert dm.run("create", "e", options=("dm.basesize=512M",)).status == 0
    info = dm.run("--json", "info", options=("dm.basesize=512M",)).json
    assert info["status"]["Base Device Size"] == "536.9 MB"


@direct
def test_containers_in_a_user_namespace(dm):
    dm("create", "a")
    root = Path(dm("--id-map", "0:100000:65536", "get", "a").text.strip())
    assert (root.stat().st_uid, root.stat().st_gid) == (100000, 100000)
    assert root.parents[2].stat().st_uid == 100000
    dm("put", "a")


# What is wrong


def make_no_sense(dm: Command, tmp_path: Path) -> None:
    assert dm.fails(10, "create", "b", "--parent", "nobody") == "layer 'nobody' does not exist"
    assert dm.fails(11, "create", "a") == "layer 'a' already exists"
    assert dm.fails(11, "import", "a", "-") == "layer 'a' already exists"
    for words in (["get", "b"], ["put", "b"], ["rm", "b"], ["inspect", "b"], ["diff", "b"],
                  ["changes", "b"], ["apply", "b"], ["diff", "a", "--parent", "b"],
                  ["apply", "a", "--parent", "b"]):  # fmt: skip
        assert dm.fails(10, *words) == "layer 'b' does not exist"
    assert dm.fails(14, "put", "a") == "layer 'a' is not mounted"
    assert "No such file" in dm.fails(1, "import", "b", tmp_path / "missing.tar")
    assert "No such file" in dm.fails(1, "apply", "a", tmp_path / "missing.tar")
    assert "Is a directory" in dm.fails(1, "apply", "a", tmp_path)


def test_requests_that_make_no_sense_are_told_the_same_by_whoever_holds_the_graph(dm, tmp_path):
    dm("create", "a")
    make_no_sense(dm, tmp_path)
    assert [each["id"] for each in dm("--json", "ls").json] == ["base", "a"]


@direct
def test_requests_that_make_no_sense_change_nothing(dm, tmp_path):
    dm("create", "a")
    dm("engine", "stop")
    before = dm.state()
    make_no_sense(dm, tmp_path)
    for option, fragment in {
        "dm.nonsense=1": "storage option 'dm.nonsense' is unknown",
        "nonsense": "storage option 'nonsense' has no value",
        "dm.basesize=big": "option dm.basesize=big: expected a size",
        "dm.blocksize=100K": "option dm.blocksize=100K: expected 64K to 1G",
        "dm.blocksize=2G": "option dm.blocksize=2G: expected 64K to 1G",
        "dm.loopmetadatasize=17G": "dm.loopmetadatasize=17G: expected a size from 64K to 16G",
        "dm.fs=ntfs": "option dm.fs=ntfs: expected ext4 or xfs",
        "dm.use_deferred_removal=maybe": "expected true or false",
    }.items():
        ended = dm.run("create", "b", options=(option,))
        assert (ended.status, ended.out) == (2, b"")
        assert fragment in ended.message
    dm("engine", "stop")
    assert "dm.blocksize" in dm.fails(25, "ls", options=("dm.blocksize=128K",))
    assert dm.state() == before


def test_removing_several_goes_on_after_one_that_fails(dm):
    dm("create", "a")
    dm("create", "c")
    ended = dm.run("rm", "a", "b", "c")
    assert (ended.status, ended.message) == (10, "layer 'b' does not exist")
    assert [each["id"] for each in dm("--json", "ls").json] == ["base"]


def test_a_mounted_layer_is_not_removed(dm):
    dm("create", "a")
    root = Path(dm("get", "a").text.strip())
    (root / "file").write_text("kept")
    assert "layer 'a' is busy" in dm.fails(12, "rm", "a")
    with (root / "file").open():
        assert "layer 'a' is busy" in dm.fails(12, "put", "a")
    assert (root / "file").read_text() == "kept"
    dm("put", "a")


def test_a_layer_in_use_is_deleted_later_if_that_is_asked_for(tmp_path):
    options = (*SMALL, "dm.use_deferred_removal=true", "dm.use_deferred_deletion=true")
    with commands(tmp_path / "home", options) as dm:
        dm("create", "a")
        dm("create", "b")
        root = Path(dm("get", "a").text.strip())
        ended = dm("rm", "a", "b")
        assert ended.text == "a: in use, deleted when its last user is gone\n"
        assert dm.run("exists", "a").status == 1
        assert [each["id"] for each in dm("--json", "ls").json] == ["base"]
        assert "being deleted" in dm.fails(11, "create", "a")
        assert dm.run("get", "a").status == 10
        assert " Deferred Deleted Device Count: 1" in dm("info").text
        assert dm("check").text == "layer 'a' is deleted when it is free\n"
        assert dm("--json", "check").json["put_off"] == ["a"]
        dm("put", "a")
        assert not root.exists()
        assert dm("check").text == "records and pool agree\n"
        dm("create", "a")
        dm("get", "a")
        assert dm("--json", "rm", "a").json == {"removed": ["a"], "put_off": ["a"]}
        dm("put", "a")


def test_records_and_pool_are_compared(dm):
    for layer in ("a", "b"):
        dm("create", layer)
    (dm.home / "metadata" / "b").rename(dm.home / "metadata" / "c")
    record = json.loads((dm.home / "metadata" / "a").read_bytes())
    (dm.home / "metadata" / "a").write_text(json.dumps({**record, "device_id": 77}))
    ended = dm.run("check")
    assert (ended.status, ended.message) == (25, "records and pool disagree: 2 findings")
    assert ended.text.splitlines() == [
        "layer 'a': its thin id 77 is not in the pool",
        "thin id 2 is in the pool, but no layer has it",
    ]
    value = dm.run("--json", "check").json
    assert value == {
        "consistent": False, "missing": [{"id": "a", "device_id": 77}], "unknown": [2],
        "shared": [], "put_off": [],
    }  # fmt: skip
    assert "layer 'a': its thin id 77 is not in the pool" in dm.fails(25, "get", "a")
    dm("get", "c")
    dm("put", "c")
    dm("rm", "a")
    assert "1 findings" in dm.run("check").message


@direct
def test_without_a_graph_only_create_and_import_make_one(dm):
    for words in (["ls"], ["info"], ["exists", "a"], ["pool", "status"], ["pool", "check"],
                  ["engine", "status"], ["engine", "stop"]):  # fmt: skip
        assert "there is no graph" in dm.fails(20, *words)
    ended = dm.run("create", "a", options=("dm.fs=ntfs",))
    assert ended.status == 2
    assert "No such file" in dm.fails(1, "import", "a", "/nonexistent.tar")
    assert not dm.home.exists()


def flip(path: Path, block: int) -> None:
    with path.open("r+b") as file:
        file.seek(block * layout.BLOCK_SIZE + 200)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def superblock_of(path: Path) -> layout.Superblock:
    with FileDevice.open(path, read_only=True) as device:
        return layout.Superblock.unpack(device.read(0))


def set_incompatible_feature(path: Path) -> None:
    with FileDevice.open(path) as device:
        found = layout.Superblock.unpack(device.read(0))
        device.write(0, seal(found._replace(incompat_flags=1).pack(), layout.SUPERBLOCK))


METADATA_DAMAGES: dict[str, tuple[int, Callable[[Path], object]]] = {
    "random": (30, lambda path: path.write_bytes(os.urandom(1 << 20))),
    "blank": (25, lambda path: path.write_bytes(bytes(1 << 20))),
    "truncated": (25, lambda path: os.truncate(path, 3 * layout.BLOCK_SIZE)),
    "empty": (25, lambda path: os.truncate(path, 0)),
    "flipped superblock": (30, lambda path: flip(path, 0)),
    "flipped mapping tree": (30, lambda path: flip(path, superblock_of(path).data_mapping_root)),
    "flipped details": (30, lambda path: flip(path, superblock_of(path).device_details_root)),
    "unknown feature": (30, set_incompatible_feature),
    "missing": (25, lambda path: path.unlink()),
}


def copy_of(home: Path, target: Path) -> Command:
    subprocess.run(["cp", "-a", "--sparse=always", str(home), str(target)], check=True)
    return Command(target)


def test_damaged_pool_metadata_are_refused_and_left_alone(tmp_path):
    origin = Command(tmp_path / "home")
    origin("create", "a")
    origin("engine", "stop")
    for number, (damage, (status, spoil)) in enumerate(METADATA_DAMAGES.items()):
        dm = copy_of(origin.home, tmp_path / str(number))
        spoil(dm.home / "devicemapper/metadata")
        before = dm.state()
        for words in (["create", "b"], ["get", "a"]):
            ended = dm.run(*words)
            assert (ended.status, ended.out) == (status, b""), (damage, ended)
            assert ended.message
        dm("engine", "stop")
        assert dm.state() == before, damage
    copy_of(origin.home, tmp_path / "good")("create", "b")
    Command(tmp_path / "good").stop()


def test_data_file_that_is_shorter_than_the_pool_is_refused(tmp_path):
    dm = Command(tmp_path / "home")
    dm("create", "a")
    dm("engine", "stop")
    os.truncate(dm.home / "devicemapper/data", 512 << 20)
    before = dm.state()
    message = dm.fails(25, "get", "a")
    assert "data" in message
    assert dm.state() == before


def test_metadata_of_another_pool_are_refused(tmp_path):
    one, other = Command(tmp_path / "one"), Command(tmp_path / "other")
    for each in (one, other):
        each("create", "a")
    other("create", "b")
    for each in (one, other):
        each("engine", "stop")
    spoiled = one.home / "devicemapper/metadata"
    spoiled.write_bytes((other.home / "devicemapper/metadata").read_bytes())
    before = one.state()
    one.fails(24, "create", "c")
    assert one.state() == before
    one.stop()


GARBAGE = {
    "no JSON": b"\x00\xff garbage",
    "empty": b"",
    "a list": b"[]",
}
WRONG_RECORDS: dict[str, dict[str, object]] = {
    "wrong type": {"device_id": "2"},
    "id over 24 bits": {"device_id": 1 << 24},
    "negative id": {"device_id": -1},
    "no size": {"size": None},
}


def test_garbage_records_are_refused_and_left_alone(tmp_path):
    dm = Command(tmp_path / "home")
    dm("create", "a")
    dm("engine", "stop")
    cases = [
        (name, garbage)
        for name in ("a", "base", "deviceset-metadata", "transaction-metadata")
        for garbage in GARBAGE.values()
    ]
    right = json.loads((dm.home / "metadata/a").read_bytes())
    for wrong in WRONG_RECORDS.values():
        record = {key: value for key, value in {**right, **wrong}.items() if value is not None}
        cases.append(("a", json.dumps(record).encode()))
    for name, content in cases:
        place = dm.home / "metadata" / name
        kept = place.read_bytes()
        place.write_bytes(content)
        before = dm.state()
        ended = dm.run("create", "b")
        assert (ended.status, ended.out) == (30, b""), (name, content, ended)
        assert repr(str(place)) in ended.message
        dm("engine", "stop")
        assert dm.state() == before, (name, content)
        place.write_bytes(kept)
    dm("create", "b")
    dm.stop()


HOSTILE = {
    "parent": [member("../outside", tarfile.REGTYPE)],
    "deep parent": [member("a/../../outside", tarfile.REGTYPE)],
    "hard link out": [member("x", tarfile.LNKTYPE, "../../../../../../etc/passwd")],
    "through a symlink": [
        member("link", tarfile.SYMTYPE, "/tmp"),
        member("link/devmapper-outside", tarfile.REGTYPE),
    ],
    "device as directory": [member("null", tarfile.CHRTYPE), member("null/x", tarfile.REGTYPE)],
}


def test_hostile_archives_leave_nothing(dm, tmp_path):
    dm("create", "a")
    for trick, members in HOSTILE.items():
        ended = dm.run("import", "bad", "-", stdin=tar_of(*members))
        assert not Path("/tmp/devmapper-outside").exists(), trick
        assert not (tmp_path / "outside").exists(), trick
        assert (ended.status, ended.out) == (13, b""), (trick, ended)
        assert "the half-made layer 'bad' was removed" in ended.message
        assert dm.run("exists", "bad").status == 1
    assert dm("--json", "engine", "status").json["devices"] == []


def test_absolute_paths_and_device_nodes_stay_inside(dm):
    null = member("dev/null", tarfile.CHRTYPE)
    null.devmajor, null.devminor = 1, 3
    dm("import", "a", "-", stdin=tar_of(member("/etc/devmapper-outside", tarfile.REGTYPE), null))
    assert dm("changes", "a").text.split() == [
        "A", "/dev", "A", "/dev/null", "A", "/etc", "A", "/etc/devmapper-outside",
    ]  # fmt: skip
    assert not Path("/etc/devmapper-outside").exists()


def test_broken_end_of_an_archive(dm):
    for compression in ("", "gz"):
        whole = tar_of(("file", os.urandom(2000)), compression=compression)
        for cut in (100, 700):
            ended = dm.run("import", "bad", "-", stdin=whole[:cut])
            assert (ended.status, ended.out) == (13, b""), (compression, cut, ended)
            assert "the half-made layer 'bad' was removed" in ended.message
    assert [each["id"] for each in dm("--json", "ls").json] == ["base"]


def test_an_archive_is_not_written_to_a_terminal(dm):
    import pty

    dm("create", "a")
    leader, follower = pty.openpty()
    try:
        process = dm.start("diff", "a", stdout=follower, stderr=subprocess.PIPE)
        err = process.communicate(timeout=60)[1]
    finally:
        os.close(leader)
        os.close(follower)
    assert process.returncode == 2
    assert err.startswith(b"devmapper: an archive is not written to a terminal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_import_that_is_interrupted_leaves_no_layer(dm, number):
    dm("create", "a")
    process = dm.start("import", "half", "-", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(tar_of(("big", bytes(1 << 20)))[: 1 << 19])
    process.stdin.flush()
    wait_for(lambda: not dm.run("exists", "half").status)
    wait_for(lambda: dm("--json", "engine", "status").json["devices"])
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert err.decode().strip().endswith("the half-made layer 'half' was removed")
    assert [each["id"] for each in dm("--json", "ls").json] == ["base", "a"]
    assert dm("--json", "engine", "status").json["devices"] == []


# A machine that lacks something


@contextmanager
def small_disk(tmp_path: Path, size: int) -> Iterator[Path]:
    """An ext4 of its own, on a loop device, at tmp_path/disk."""
    image, place = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(size)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_runs_full_is_told_and_leaves_no_layer(tmp_path):
    with small_disk(tmp_path, 64 << 20) as place, commands(place / "home") as dm:
        dm("create", "a")
        archive = tar_of(("big", os.urandom(100 << 20)))
        ended = dm.run("import", "big", "-", stdin=archive)
        assert ended.status not in (0, 70)
        assert ended.out == b""
        assert "the half-made layer 'big'" in ended.err
        assert "No space left on device" in ended.err


def test_a_disk_that_is_full_from_the_start(tmp_path):
    with small_disk(tmp_path, 16 << 20) as place:
        (place / "home").mkdir()
        with (place / "ballast").open("wb") as ballast:
            try:
                while True:
                    ballast.write(bytes(1 << 16))
                    ballast.flush()
            except OSError:
                pass
        dm = Command(place / "home")
        ended = dm.run("create", "a")
        assert ended.status not in (0, 70)
        assert ended.message
        assert dm.run("engine", "stop").status in (0, 20)


def test_a_disk_that_cannot_be_written(tmp_path):
    with small_disk(tmp_path, 64 << 20) as place:
        dm = Command(place / "home")
        dm("create", "a")
        dm.stop()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        before = dm.state()
        assert "Read-only file system" in dm.fails(1, "create", "b")
        assert "Read-only file system" in Command(place / "other").fails(1, "create", "b")
        assert dm.state() == before
        dm.run("engine", "stop")


@direct
def test_heavy_modules_are_not_imported_for_exists(dm):
    dm("create", "a")
    words = [sys.executable, "-X", "importtime", *dm.argv("exists", "a")[1:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "devmapper.engine.embedded.client" in loaded
    heavy = {
        "rich",
        "zstandard",
        "tarfile",
        "asyncio",
        "unittest",
        "google_crc32c",
        "xml",
        "pydantic",
    }
    assert loaded & heavy == set()


def test_tables_and_bars_on_a_terminal(dm):
    """On a terminal a table is drawn and a bar moves; both only there."""
    import pty

    dm("create", "a")
    leader, follower = pty.openpty()
    try:
        process = dm.start("ls", stdout=follower, stderr=follower)
        assert process.wait(60) == 0
        shown = os.read(leader, 65536).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert "EXCLUSIVE" in shown
    assert "─" in shown
    assert json.loads(dm("--json", "ls").out)


def ask_for_a_check(metadata: Path) -> None:
    """Leave a pool as a failed commit does."""
    with closing(FileDevice.open(metadata)) as device:
        PoolMetadata.open(device).set_needs_check(needs_check=True)


def test_a_pool_that_asks_for_a_check_is_writable_after_it(tmp_path):
    metadata = tmp_path / "home" / "devicemapper" / "metadata"
    with commands(tmp_path / "home") as dm:
        dm("create", "a")
        dm.stop()
        ask_for_a_check(metadata)
        assert "'ro'" in dm.fails(22, "create", "b")
        assert "a" in dm("ls").out.decode()
        assert str(metadata) in dm.fails(12, "pool", "check", "--clear-needs-check")
        dm.stop()
        cleared = dm("--json", "pool", "check", "--clear-needs-check").json
        assert cleared["needs_check"]
        assert cleared["cleared_needs_check"]
        dm("create", "b")
        assert dm("--json", "pool", "status").json["mode"] == "rw"


@direct
def test_another_block_size_is_refused_while_the_pool_is_in_use(dm):
    dm("create", "a")
    ended = dm.run("ls", options=("dm.blocksize=128K",))
    assert ended.status == 25
    assert "dm.blocksize asks for 131072" in ended.err
    assert dm("exists", "a").status == 0


def test_a_pool_on_block_devices_of_its_own(tmp_path):
    devices = []
    for name, size in (("data", 1 << 30), ("metadata", 32 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        devices.append(loop.attach(tmp_path / name))
    try:
        data, metadata = devices
        options = (f"dm.datadev={data}", f"dm.metadatadev={metadata}", "dm.basesize=512M")
        with commands(tmp_path / "home", options) as dm:
            dm("create", "a")
            root = Path(dm("get", "a").text.strip())
            (root / "x").write_text("hello")
            dm("put", "a")
            dm.stop()
            rows = dict(dm("--json", "info").json["status"])
            assert (rows["Data file"], rows["Metadata file"]) == (str(data), str(metadata))
            assert "Data loop file" not in rows
            assert dm("changes", "a").text == "A /x\n"
            dm.stop()
            assert thin_tools.thin_check(metadata)
            assert not (tmp_path / "home" / "devicemapper").exists()
    finally:
        for device in devices:
            loop.detach(device)
