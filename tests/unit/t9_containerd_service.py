"""containerd's Snapshots service over a real socket, on a graph whose devices are plain files.

tests/conformance has what needs devices, tests/suites what containerd itself demands.
"""

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devmapper import errors
from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.names import BASE, LayerId
from devmapper.deviceset.sizing import create_layer
from devmapper.errors import DevmapperError, PoolFull, Space, UsageError
from devmapper.server.containerd.api import snapshots_pb2 as api
from devmapper.server.containerd.service import SnapshotsService
from devmapper.server.containerd.translate import translate
from devmapper.server.operations import Operations
from devmapper.snapshots import Kind, Snapshots
from devmapper.snapshots.index import Entry
from devmapper.snapshots.record import SnapshotRecord, encode
from devmapper.snapshots.root import ROOT_LAYER
from devmapper.units import ThinId
from tests.support.graphs import open_small
from tests.support.local_engine import LocalEngine
from tests.support.snapshots_client import connected

SECOND = 10**9
RPCS = ("Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "Usage")


def make_root(devices: DeviceSet) -> None:
    """The root of snapshots as it is, but for mkfs's lost+found: to remove that takes a mount."""
    parts = devices.parts
    record = SnapshotRecord("", Kind.COMMITTED, BASE, {}, 1, 1)
    with parts.mounts.hold(ROOT_LAYER, BASE):
        create_layer(parts.graph, parts.mounts, ROOT_LAYER, BASE, None, extra=encode(record))


@pytest.fixture
def devices(tmp_path):
    engine = LocalEngine()
    with open_small(tmp_path / "graph", engine) as devices:
        make_root(devices)
        yield devices
        devices.shutdown()


@pytest.fixture
def snapshots(devices):
    return Snapshots(devices)


@pytest.fixture
def operations():
    return Operations()


@pytest.fixture
def socket(tmp_path_factory):
    return tmp_path_factory.mktemp("s") / "c.sock"


@pytest.fixture
def service(snapshots, socket, operations):
    service = SnapshotsService(snapshots, socket, operations)
    service.start()
    yield service
    service.stop(10.0)
    assert list(socket.parent.iterdir()) == []


@pytest.fixture
def client(service, socket):
    with connected(socket) as client:
        yield client


@contextmanager
def refused(code: grpc.StatusCode, words: str = "") -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as raised:
        yield
    assert raised.value.code() is code, raised.value.details()
    details = raised.value.details()
    assert details
    assert "\n" not in details
    assert words in details


def test_the_life_of_a_snapshot(client):
    before = time.time_ns()
    (mount,) = client.prepare("ns/1/a", labels={"l": "1", "empty": ""})
    assert mount.type == "ext4"
    assert Path(mount.source).exists()
    assert mount.target == ""
    assert "ro" not in mount.options
    assert list(client.mounts("ns/1/a")) == [mount]
    active = client.stat("ns/1/a")
    assert (active.name, active.parent, active.kind) == ("ns/1/a", "", api.ACTIVE)
    assert dict(active.labels) == {"l": "1"}
    assert active.created_at == active.updated_at
    assert before <= active.created_at.ToNanoseconds() <= time.time_ns()

    client.commit("ns/2/base", "ns/1/a", {"l": "2"})
    with refused(grpc.StatusCode.NOT_FOUND, "ns/1/a"):
        client.stat("ns/1/a")
    committed = client.stat("ns/2/base")
    assert (committed.kind, dict(committed.labels)) == (api.COMMITTED, {"l": "2"})

    (seen,) = client.view("v", "ns/2/base")
    assert "ro" in seen.options
    assert client.stat("v").kind == api.VIEW
    assert client.stat("v").parent == "ns/2/base"
    size, inodes = client.usage("v")
    assert size >= 0
    assert inodes >= 0
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "remove"):
        client.remove("ns/2/base")
    client.remove("v")
    client.remove("ns/2/base")
    client.cleanup()
    assert client.infos() == []


def test_update_takes_a_mask(client):
    client.prepare("a", labels={"keep": "1", "x.y/z": "2", "gone": "3"})
    found = client.update(
        "a", {"x.y/z": "new", "keep": "not asked for"}, "labels.x.y/z", "labels.gone"
    )
    assert dict(found.labels) == {"keep": "1", "x.y/z": "new"}
    assert found.updated_at.ToNanoseconds() > found.created_at.ToNanoseconds()
    assert dict(client.update("a", {"all": "1"}).labels) == {"all": "1"}
    assert dict(client.update("a", {}, "labels").labels) == {}
    for path in ("name", "parent", "kind", "created_at", "labels.", ""):
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            client.update("a", {"all": "2"}, path)
    with refused(grpc.StatusCode.NOT_FOUND):
        client.update("b", {})


def test_statuses(client):
    client.prepare("a")
    client.prepare("b")
    client.commit("c", "b")
    with refused(grpc.StatusCode.ALREADY_EXISTS):
        client.prepare("a")
    with refused(grpc.StatusCode.ALREADY_EXISTS):
        client.view("c", "c")
    with refused(grpc.StatusCode.ALREADY_EXISTS):
        client.commit("c", "a")
    with refused(grpc.StatusCode.NOT_FOUND, "missing"):
        client.prepare("d", "missing")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "committed"):
        client.prepare("d", "a")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "committed"):
        client.mounts("c")
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        client.commit("d", "c")
    client.view("v", "c")
    with refused(grpc.StatusCode.FAILED_PRECONDITION):
        client.commit("d", "v")
    for method in ("stat", "mounts", "usage", "remove"):
        with refused(grpc.StatusCode.NOT_FOUND, "missing"):
            getattr(client, method)("missing")
    assert client.names() == ["a", "c", "v"]


def test_a_commit_on_another_parent_is_refused(client):
    client.prepare("a")
    client.commit("base", "a")
    client.prepare("b", "base")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "another parent"):
        client.commit("c", "b", parent="other")
    assert client.names() == ["b", "base"]
    client.commit("c", "b", parent="base")
    assert client.stat("c").parent == "base"


def test_lists_in_chunks_by_filters(client, snapshots):
    client.prepare("a")
    client.commit("base", "a")
    for number in range(134):
        client.view(f"v{number:03}", "base", {"even": "yes"} if number % 2 == 0 else {})
    assert [len(chunk) for chunk in client.chunks()] == [100, 35]
    assert client.names() == ["base", *(f"v{number:03}" for number in range(134))]
    assert [len(chunk) for chunk in client.chunks("labels.even", "name==base")] == [68]
    assert client.names("kind==view,name~=/^v01[0-2]$/", "kind==committed") == [
        "base", "v010", "v011", "v012",
    ]  # fmt: skip
    assert list(client.chunks("kind==active")) == []
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "filter 'kind=active'"):
        client.names("kind=active")
    by_name = {info.name: info for info in client.infos()}
    assert by_name["v010"] == client.stat("v010")


def test_ten_thousand_are_listed_whole(client, snapshots):
    client.prepare("a")
    client.commit("base", "a")
    base = snapshots._index.get("base")
    for number in range(10_000):
        labels = {"containerd.io/snapshot.ref": f"sha256:{number:064x}"}
        record = SnapshotRecord(f"{number:05}", Kind.COMMITTED, base.layer, labels, 1, 1)
        snapshots._index.add(Entry(LayerId(f"snapshot-{number}"), base.record, record))
    assert len(client.infos("name!=base")) == 10_000


def test_bad_names(client):
    for method in RPCS:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "empty"):
            client.raw(method, b"")
    for key in ("nul\0", "x" * 5000):
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            client.prepare(key)
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            client.stat(key)
    client.prepare("\u00fcml\u00e4ut \U0001f40d/\n../..")
    assert client.names() == ["\u00fcml\u00e4ut \U0001f40d/\n../.."]


@pytest.mark.parametrize(
    "raw",
    [
        b"\x12\x05abc",  # a length beyond the end
        b"\x12\x02\xff\xfe",  # text that is no UTF-8
        b"\xff" * 20,  # no tag
        b"\x12",
    ],
)
def test_bytes_that_are_no_message(client, caplog, raw):
    for method in RPCS:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "cannot be decoded"):
            client.raw(method, raw)
    ask = client.channel.unary_stream("/containerd.services.snapshots.v1.Snapshots/List")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "ListSnapshotsRequest"):
        list(ask(raw))
    assert client.infos() == []
    assert caplog.records == []


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(method=st.sampled_from(("Stat", "Update", "Mounts", "Usage", "Commit", "Remove")),
       raw=st.binary(max_size=60))  # fmt: skip
def test_any_bytes_have_an_answer(client, method, raw):
    with pytest.raises(grpc.RpcError) as raised:
        client.raw(method, raw)
    assert raised.value.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
    ), raised.value


def test_fields_of_other_types_are_not_ours(client):
    """Protobuf's rule: what has another wire type is an unknown field."""
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "empty"):
        client.raw("Stat", b"\x10\x07")  # key = 2 as a number


def test_large_requests(client):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "labels have"):
        client.prepare("a", labels={str(number): "x" * 4000 for number in range(200)})
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        client.prepare("a", labels={"l": "x" * (5 << 20)})
    assert client.infos() == []


def test_unknown_methods_and_services(client):
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        client.raw("Nothing", b"")
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        client.channel.unary_unary("/containerd.services.content.v1.Content/Info")(b"")


def test_what_nobody_expects_is_logged_once(client, snapshots, monkeypatch, caplog):
    def broken(_name: str) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(snapshots, "stat", broken)
    with refused(grpc.StatusCode.INTERNAL, "internal error: RuntimeError: two lines"):
        client.stat("a")
    (record,) = caplog.records
    assert record.getMessage() == "Stat failed"
    assert record.exc_info is not None


def test_requests_are_counted(client, operations):
    client.prepare("a")
    with refused(grpc.StatusCode.NOT_FOUND):
        client.stat("b")
    client.names()
    value = operations.registry.get_sample_value

    for operation in ("Prepare", "Stat", "List"):
        labels = {"front_end": "containerd", "operation": operation}
        assert value("devmapper_operation_duration_seconds_count", labels) == 1
    labels = {"front_end": "containerd", "operation": "Stat", "error": "SnapshotNotFound"}
    assert value("devmapper_operation_errors_total", labels) == 1


class Gate:
    """Holds requests of one kind until it is opened."""

    def __init__(self, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.leave = threading.Event()
        self.calls: list[str] = []
        real = snapshots.stat

        def stat(name: str) -> object:
            self.calls.append(name)
            self.entered.release()
            assert self.leave.wait(30)
            return real(name)

        monkeypatch.setattr(snapshots, "stat", stat)


@pytest.fixture
def gate(client, snapshots, monkeypatch):
    gate = Gate(snapshots, monkeypatch)
    yield gate
    gate.leave.set()


def test_what_nobody_waits_for_any_more_is_not_begun(client, gate):
    request = api.StatSnapshotRequest(key="held").SerializeToString()
    with ThreadPoolExecutor(40) as clients:
        held = [clients.submit(client.raw, "Stat", request) for _ in range(32)]
        for _ in range(32):
            assert gate.entered.acquire(timeout=60)
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
            late = api.StatSnapshotRequest(key="late").SerializeToString()
            client.raw("Stat", late, timeout=0.2)
        gate.leave.set()
        assert {type(one.exception()).__name__ for one in held} == {"_InactiveRpcError"}
    client.names()
    assert "late" not in gate.calls


def test_stop_waits_for_requests_under_way(service, client, socket, gate):
    client.prepare("a")
    with ThreadPoolExecutor(2) as threads:
        stat = threads.submit(client.stat, "a")
        assert gate.entered.acquire(timeout=60)
        stopping = threads.submit(service.stop, 10.0)
        time.sleep(0.1)
        assert not stopping.done()
        gate.leave.set()
        assert stat.result(60).name == "a"
        stopping.result(60)
    assert not socket.exists()
    service.stop()
    with refused(grpc.StatusCode.UNAVAILABLE):
        client.stat("a")


def test_stop_waits_for_a_request_whose_client_has_left(service, client, gate):
    client.prepare("a")
    request = api.StatSnapshotRequest(key="a").SerializeToString()
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED):
        client.raw("Stat", request, timeout=0.2)
    with ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(service.stop, 10.0)
        time.sleep(0.2)
        assert not stopping.done()
        gate.leave.set()
        stopping.result(60)


def test_stop_does_not_wait_for_ever(service, client, gate, caplog):
    with ThreadPoolExecutor(1) as threads:
        stat = threads.submit(client.stat, "a")
        assert gate.entered.acquire(timeout=60)
        service.stop(0.2)
        assert "broken off" in caplog.text
        assert isinstance(stat.exception(10), grpc.RpcError)
        gate.leave.set()


def test_many_at_once(client):
    client.prepare("a")
    client.commit("base", "a")
    with ThreadPoolExecutor(64) as clients:
        list(clients.map(lambda n: client.view(f"v{n}", "base"), range(100)))
        found = list(clients.map(lambda _: len(client.infos()), range(20)))
        list(clients.map(lambda n: client.remove(f"v{n}"), range(100)))
    assert found == [101] * 20
    assert client.names() == ["base"]


def test_the_socket(service, socket, snapshots, operations):
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert [entry.name for entry in socket.parent.iterdir()] == ["c.sock"]
    other = SnapshotsService(snapshots, socket, operations)
    with pytest.raises(OSError, match="another process listens") as raised:
        other.start()
    assert raised.value.errno == errno.EADDRINUSE
    other.stop()
    assert socket.exists()


def test_sockets_that_cannot_be_had(snapshots, operations, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="not a socket"):
        SnapshotsService(snapshots, tmp_path / "file", operations).start()
    with pytest.raises(UsageError):
        SnapshotsService(snapshots, Path("relative"), operations).start()
    assert (tmp_path / "file").read_text() == "precious"


def test_a_path_with_characters_of_urls(snapshots, operations, tmp_path):
    socket = tmp_path / "100% ? #\udcff" / "c.sock"
    service = SnapshotsService(snapshots, socket, operations)
    service.start()
    try:
        assert stat.S_ISSOCK(socket.stat().st_mode)
    finally:
        service.stop()
    assert list(socket.parent.iterdir()) == []


def test_starts_again_where_it_was(snapshots, operations, socket):
    for _ in range(2):
        service = SnapshotsService(snapshots, socket, operations)
        service.start()
        with connected(socket) as client:
            assert client.names() == []
        service.stop()


def every_error() -> list[type[DevmapperError]]:
    found, left = [], [DevmapperError]
    while left:
        kind = left.pop()
        found.append(kind)
        left += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status(kind, caplog):
    error = kind.__new__(kind)
    Exception.__init__(error, "what failed")
    error.hint = "what to do"
    with caplog.at_level(logging.CRITICAL):
        status = translate(error, "Prepare")
    unexpected = (
        DevmapperError, errors.ToolError, errors.LayerError, errors.MountFailed,
        errors.ArchiveError, errors.PoolError, errors.ThinIdError, errors.ThinIdExists,
        errors.ThinIdMissing,
    )  # fmt: skip
    assert (status.code is grpc.StatusCode.INTERNAL) == (kind in unexpected)
    assert status.text == "what failed; what to do"


def test_statuses_of_other_errors(caplog):
    full = PoolFull(Space.DATA, free=0)
    full.add_note("nothing was made")
    assert translate(full, "Prepare").code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "; nothing was made; remove layers" in translate(full, "Prepare").text
    disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/graph")
    assert translate(disk, "Commit").code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caplog.records == []
    damage = errors.RecordCorrupt(Path("/graph/metadata/x"), "no JSON")
    assert translate(damage, "Stat").code is grpc.StatusCode.DATA_LOSS
    io = OSError(errno.EIO, os.strerror(errno.EIO), "/graph")
    assert translate(io, "Stat").code is grpc.StatusCode.INTERNAL
    assert translate(errors.ThinIdMissing(ThinId(7)), "Stat").code is grpc.StatusCode.INTERNAL
    assert len(caplog.records) == 3


def test_a_status_fits_into_a_header(client):
    """gRPC drops a reply whose status has more than 8 KiB, percent-encoded."""
    with refused(grpc.StatusCode.NOT_FOUND, "..."):
        client.stat("\U0001f40d" * 1000)
    text = translate(UsageError("\udcff" * 5000), "Stat").text
    assert len(text.encode()) <= 2000
