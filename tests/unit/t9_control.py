"""The control service and its client: the same answers as without a daemon, whatever is sent."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pytest

from devmapper import errors
from devmapper.cli import settings as cli_settings
from devmapper.cli.settings import Settings
from devmapper.deviceset.names import LayerId
from devmapper.deviceset.owners import ownership_of
from devmapper.driver import Driver
from devmapper.errors import (
    ArchiveError,
    DevmapperError,
    GraphLocked,
    LayerBusy,
    LayerExists,
    LayerNotFound,
    UsageError,
)
from devmapper.graph import calls, failures
from devmapper.graph.codec import Unfit, decode, encode
from devmapper.graph.failures import DaemonError, RemoteError
from devmapper.graph.frames import Kind, pack, pack_json, read_frame
from devmapper.graph.local import LocalGraph
from devmapper.graph.model import LayerRow, OpenGraph
from devmapper.graph.remote import RemoteGraph
from devmapper.server import lock
from devmapper.server.control.service import MAX_REQUEST, ControlService
from devmapper.server.operations import Operations
from tests.support.graphs import check_consistent, open_small
from tests.support.local_engine import LocalEngine
from tests.support.waiting import wait_for

SECONDS = 60.0


class TreeDriver(Driver):
    """A driver without mounts: the files of a layer are in a plain directory."""

    trees: Path
    held: Counter[str]

    @contextmanager
    def _tree(self, id: str) -> Iterator[Path]:  # noqa: A002 - the seed's name
        if not self.exists(id):
            raise LayerNotFound(id)
        root = self.trees / id
        root.mkdir(parents=True, exist_ok=True)
        self.held[id] += 1
        try:
            yield root
        finally:
            self.held[id] -= 1


class Served(NamedTuple):
    driver: TreeDriver
    service: ControlService
    path: Path
    operations: Operations

    @property
    def local(self) -> LocalGraph:
        return LocalGraph(self.driver)

    @property
    def remote(self) -> RemoteGraph:
        return RemoteGraph(self.path)

    def await_release(self) -> None:
        """Until nobody looks at a layer's files any more."""
        wait_for(lambda: not self.driver.held.total())
        assert +self.driver.held == Counter()


@pytest.fixture
def served(tmp_path):
    with open_small(tmp_path / "graph", LocalEngine()) as devices:
        driver = TreeDriver(devices)
        driver.trees, driver.held = tmp_path / "trees", Counter()
        operations = Operations()
        service = ControlService(driver, None, operations, tmp_path / "control.sock")
        service.start()
        try:
            yield Served(driver, service, tmp_path / "control.sock", operations)
        finally:
            service.stop(5.0)
            assert not (tmp_path / "control.sock").exists()
            assert +driver.held == Counter()
            check_consistent(tmp_path / "graph", devices)


def tar_of(**files: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


# The same answers


def outcome(call: Any) -> object:
    """What a call returns, or what a user would read of its error."""
    try:
        return call()
    except DevmapperError as err:
        return type(err), str(err), err.hint, err.exit_code, vars(err)
    except OSError as err:
        return type(err), err.errno, err.strerror, err.filename


def life(graph: OpenGraph) -> list[object]:
    """A bit of everything."""

    def diff() -> bytes:
        with graph.diff("b", "a") as stream:
            return stream.read()

    archive = tar_of(one=b"1", two=b"2" * 300_000)
    return [
        outcome(call)
        for call in (
            lambda: graph.create("a"),
            lambda: graph.create("b", "a"),
            lambda: graph.create("b", "a"),
            lambda: graph.create("c", "nobody"),
            lambda: graph.create("../c"),
            lambda: graph.create("c", "a", size=1),
            lambda: graph.exists("a"),
            lambda: graph.exists("c"),
            lambda: graph.exists("a/b"),
            lambda: graph.apply("b", "a", io.BytesIO(archive)),
            lambda: graph.apply("b", "", io.BytesIO(archive[:700])),
            lambda: graph.apply("c", "", io.BytesIO(archive)),
            lambda: graph.apply("b", "c", io.BytesIO(archive)),
            lambda: graph.changes("b", "a"),
            lambda: graph.changes("c"),
            lambda: graph.diff_size("b", "a"),
            diff,
            graph.layers,
            lambda: graph.inspect("b"),
            lambda: graph.inspect("c"),
            graph.info,
            graph.id_maps,
            graph.resize,
            lambda: graph.resize(1),
            lambda: graph.resize(8 << 20).data.total,
            graph.consistency,
            lambda: graph.put("a"),
            lambda: graph.put("c"),
            lambda: graph.engine()._replace(devices=()),
            lambda: graph.deactivate("a"),
            lambda: graph.remove("c"),
            lambda: graph.remove("b"),
            lambda: graph.remove("a", force=True),
            lambda: [row.id for row in graph.layers()],
        )
    ]


def test_a_graph_at_the_daemon_answers_as_one_of_our_own(tmp_path):
    found = []
    for name in ("local", "remote"):
        home = tmp_path / "graph"
        with open_small(home, LocalEngine()) as devices:
            driver = TreeDriver(devices)
            driver.trees, driver.held = tmp_path / "trees", Counter()
            service = ControlService(driver, None, Operations(), tmp_path / "control.sock")
            service.start()
            try:
                remote = RemoteGraph(tmp_path / "control.sock")
                found.append(life(LocalGraph(driver) if name == "local" else remote))
            finally:
                service.stop(5.0)
            devices.shutdown()
        home.rename(tmp_path / name)
        (tmp_path / "trees").rename(tmp_path / f"{name}-trees")
    for number, (local, remote_answer) in enumerate(zip(*found, strict=True)):
        assert without_times(remote_answer) == without_times(local), number


def without_times(value: object) -> object:
    """Times of files and the graph's inode differ between two graphs."""
    if isinstance(value, bytes):
        with tarfile.open(fileobj=io.BytesIO(value)) as archive:
            return [(each.name, each.size) for each in archive]
    text = repr(value)
    for name in ("docker-",):
        parts = text.split(name)
        text = name.join([parts[0], *(part.split("-", 2)[-1] for part in parts[1:])])
    return text


def test_names_of_files_that_are_no_text_arrive(served):
    served.remote.create("a")
    with served.driver._tree("a") as root:
        Path(os.fsdecode(os.fsencode(root) + b"/bad\xff")).touch()
    assert [each.path for each in served.remote.changes("a")] == ["/bad\udcff"]


def test_operations_are_counted_by_their_names(served):
    served.remote.create("a")
    with pytest.raises(LayerExists):
        served.remote.create("a")
    value = served.operations.registry.get_sample_value
    labels = {"front_end": "control", "operation": "create"}
    assert value("devmapper_operation_duration_seconds_count", labels) == 2
    assert value("devmapper_operation_errors_total", {**labels, "error": "LayerExists"}) == 1


def test_the_overview_for_devmapper_top(served):
    from devmapper.server.overview import from_json

    served.remote.create("a")
    found = from_json(served.remote.overview())
    assert found.served
    assert ("control", "create") in [each[:2] for each in found.operations]


# Errors


EXAMPLES = [
    UsageError("no", hint="yes"),
    LayerNotFound("a"),
    LayerBusy("a", ["process 1", "process 2"]),
    LayerExists("a", deleted=True),
    GraphLocked(Path("/graph"), "process 1"),
    errors.PoolFull(errors.Space.DATA, free=1, needed=2),
    errors.TransactionConflict(1, 2),
    errors.ArchiveError("etc/passwd", "it is damaged"),
    errors.ToolError(["mkfs"], 1, "no"),
    errors.MountFailed("a", Path("/mnt"), "no"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_arrives_as_what_it_was(error):
    error.add_note("and more")
    told = json.loads(json.dumps(failures.to_json(error)))
    assert set(told["error"]) >= {"class", "message", "hint", "exit_code"}
    found = failures.from_json(told)
    assert isinstance(found, DevmapperError)
    assert type(found) is type(error)
    assert (str(found), found.hint, found.exit_code) == (str(error), error.hint, error.exit_code)
    assert vars(found) == vars(error)


def test_errors_of_other_kinds():
    missing = failures.from_json(failures.to_json(FileNotFoundError(2, "No such file", "/x")))
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.strerror, missing.filename) == (2, "No such file", "/x")
    bug = failures.from_json(failures.to_json(ZeroDivisionError("by zero")))
    assert isinstance(bug, RemoteError)
    assert (str(bug), bug.exit_code) == ("internal error: ZeroDivisionError: by zero", 70)
    newer = {"error": {"class": "NewError", "message": "new", "hint": "h", "exit_code": 55}}
    assert vars(failures.from_json(newer))["hint"] == "h"
    assert cast("DevmapperError", failures.from_json(newer)).exit_code == 55
    garbage: list[dict[str, object]] = [
        {}, {"error": "no"}, {"error": {"exit_code": "5"}}, {"error": {"class": []}},
    ]  # fmt: skip
    for wrong in garbage:
        assert isinstance(failures.from_json(wrong), DevmapperError)


@pytest.mark.parametrize(
    ("kind", "value", "fragment"),
    [
        (calls.Creation, {}, "'layer' is missing"),
        (calls.Creation, {"layer": 1}, "'layer' is 1, expected a string"),
        (calls.Creation, {"layer": "a", "size": True}, "'size' is True, expected an integer"),
        (calls.Creation, {"layer": "a", "x": 1}, "'x' is unknown"),
        (calls.Creation, [], "is [], expected an object"),
        (calls.Wishes, {"id_maps": ["a", 1]}, "'id_maps[1]' is 1, expected a string"),
        (calls.Wishes, {"id_maps": "a"}, "expected a list"),
        (calls.Removal, {"layer": "a", "force": 0}, "expected true or false"),
        (calls.Changes, {"changes": [{"path": "/", "kind": 7}]}, "expected one of [0, 1, 2]"),
    ],
)
def test_what_is_not_what_was_declared(kind, value, fragment):
    with pytest.raises(Unfit) as raised:
        decode(kind, value)
    assert fragment in str(raised.value)


def test_a_newer_daemon_is_understood():
    row = LayerRow("a", 1, 2, 3, 4, 5, active=True, mounted=False)
    told = cast("dict[str, object]", encode(row))
    assert decode(LayerRow, {**told, "new": 1}, strict=False) == row


# Hostile requests


def send(path: Path, raw: bytes, *, half_close: bool = False) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(path))
        client.sendall(raw)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        found = b""
        while piece := client.recv(65536):
            found += piece
        return found


def post(name: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {name} HTTP/1.1", "Host: x", "Connection: close", *headers]
    if not any("Encoding" in each for each in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + b"0\r\n\r\n"


def apply_of(*frames: bytes) -> bytes:
    return post("/v1/apply", chunked(*frames), "Transfer-Encoding: chunked")


HOSTILE = {
    "not JSON": (post("/v1/create", b"{"), 400, "not JSON"),
    "no body": (post("/v1/create", b""), 400, "not JSON"),
    "not UTF-8": (post("/v1/create", b'{"layer": "\xff"}'), 400, "not JSON"),
    "a list": (post("/v1/create", b"[]"), 400, "not a JSON object"),
    "nested": (post("/v1/create", b"[" * 60_000), 400, "not JSON"),
    "twice": (post("/v1/create", b'{"layer": "x", "layer": "y"}'), 400, "twice"),
    "not a number": (post("/v1/resize", b'{"size": NaN}'), 400, "NaN"),
    "a float": (post("/v1/resize", b'{"size": 1e9}'), 400, "expected an integer"),
    "wrong type": (post("/v1/create", b'{"layer": {}}'), 400, "expected a string"),
    "unknown member": (post("/v1/create", b'{"layer": "x", "y": 1}'), 400, "unknown"),
    "id that leaves": (post("/v1/create", b'{"layer": "../x"}'), 400, "contains '/'"),
    "surrogate": (post("/v1/create", b'{"layer": "\\udcff"}'), 400, "not valid Unicode"),
    "huge": (post("/v1/create", b" " * (MAX_REQUEST + 1)), 413, f"more than {MAX_REQUEST} bytes"),
    "unknown call": (post("/v1/format-disk", b"{}"), 404, "knows no call"),
    "other version": (post("/v9/create", b"{}"), 404, "knows no call"),
    "outside": (post("/../../etc/passwd", b"{}"), 404, "knows no call"),
    "GET": (b"GET /v1/layers HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405, "takes POST"),
    "missing layer": (post("/v1/inspect", b'{"layer": "x"}'), 404, "does not exist"),
    "apply without frames": (apply_of(), 400, "no transfer"),
    "apply of garbage": (apply_of(b"garbage garbage"), 400, "no transfer"),
    "frame that lies": (apply_of(b"\x01\xff\xff\xff\xff"), 400, "no transfer"),
    "data first": (apply_of(pack(Kind.DATA, b"x")), 400, "no transfer"),
    "wrong arguments": (apply_of(pack_json(Kind.ARGUMENTS, {"layer": 1})), 400, "expected a str"),
    "broken frames": (
        apply_of(pack_json(Kind.ARGUMENTS, {"layer": "a"}), b"\x07" * 5),
        400,
        "a frame of kind 7",
    ),
    "no end": (apply_of(pack_json(Kind.ARGUMENTS, {"layer": "a"})), 400, "broken off"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_request_is_one_clear_error(served, name):
    served.remote.create("a")
    raw, status, fragment = HOSTILE[name]
    head, _, body = send(served.path, raw).partition(b"\r\n\r\n")
    assert head.split()[1] == str(status).encode()
    told = json.loads(body)["error"]
    assert fragment in told["message"]
    assert {"class", "message", "hint", "exit_code"} <= told.keys()
    assert [row.id for row in served.remote.layers()] == ["base", "a"]


@pytest.mark.parametrize(
    "raw", [b"\0" * 100, b"GET\r\n\r\n", b"POST /v1/create HTTP/9.9\r\n\r\n", b"x" * 100_000]
)
def test_what_is_not_http_is_refused(served, raw):
    assert send(served.path, raw, half_close=True).split()[1:2] in ([b"400"], [])
    served.remote.create("a")


def test_a_thousand_requests_at_once(served):
    served.remote.create("a")

    def one(number: int) -> bool:
        graph: RemoteGraph = served.remote
        if number % 100 == 0:
            graph.create(f"layer{number}", "a")
        return graph.exists("a" if number % 2 else "b")

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(one, range(1000)))
    assert found == [bool(number % 2) for number in range(1000)]
    assert len(served.remote.layers()) == 12


def test_slow_tars_keep_nobody_from_short_calls(served):
    served.remote.create("a")
    begun = post("/v1/apply", b"", "Transfer-Encoding: chunked")
    frame = pack_json(Kind.ARGUMENTS, {"layer": "a"})
    clients = []
    try:
        for _ in range(80):  # more than there are threads for them
            client = socket.socket(socket.AF_UNIX)
            clients.append(client)
            client.connect(str(served.path))
            client.sendall(begun + b"%x\r\n%b\r\n" % (len(frame), frame))
        assert served.remote.exists("a")
    finally:
        for client in clients:
            client.close()
    served.await_release()
    with served.remote.diff("a") as stream:
        assert stream.read()


# Tars that are broken off


def test_a_client_that_disconnects_amid_a_transfer(served):
    served.remote.create("a")
    archive = tar_of(one=bytes(1 << 20))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(served.path))
        client.sendall(post("/v1/apply", b"", "Transfer-Encoding: chunked"))
        for frame in (
            pack_json(Kind.ARGUMENTS, {"layer": "a"}),
            pack(Kind.DATA, archive[: 1 << 19]),
        ):
            client.sendall(b"%x\r\n%b\r\n" % (len(frame), frame))
        wait_for(lambda: served.driver.held["a"])
    served.await_release()
    assert served.remote.apply("a", "", io.BytesIO(archive)) == 1 << 20


def test_a_client_that_disconnects_amid_a_diff(served):
    served.remote.create("a")
    served.remote.apply("a", "", io.BytesIO(tar_of(one=os.urandom(8 << 20))))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(served.path))
        client.sendall(post("/v1/diff", b'{"layer": "a"}'))
        assert client.recv(1000)
        assert served.driver.held["a"]
    served.await_release()


def test_a_reader_that_has_enough_lets_go(served):
    served.remote.create("a")
    served.remote.apply("a", "", io.BytesIO(tar_of(one=os.urandom(8 << 20))))
    with served.remote.diff("a") as stream:
        stream.read(1000)
    served.await_release()

    def stop_amid() -> None:
        with served.remote.diff("a") as stream:
            stream.read(1000)
            raise BrokenPipeError("stdout")

    with pytest.raises(BrokenPipeError, match="stdout"):  # is not the daemon's
        stop_amid()
    served.await_release()


class Interrupted(io.BytesIO):
    """A tar whose reader gets Ctrl-C amid it."""

    def read1(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 1 << 19:
            raise KeyboardInterrupt
        return super().read1(1 << 17)


def test_an_interrupted_transfer_is_over_when_the_command_ends(served):
    served.remote.create("a")
    with pytest.raises(KeyboardInterrupt):
        served.remote.apply("a", "", Interrupted(tar_of(one=bytes(4 << 20))))
    assert +served.driver.held == Counter()
    assert not served.remote.remove("a")


def test_damage_is_told_while_the_producer_still_waits(served):
    """As without a daemon: who writes to the pipe may never end."""
    served.remote.create("a")
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb") as stream, open(write_fd, "wb", buffering=0) as producer:
        writer = threading.Thread(target=producer.write, args=(b"no tar at all" * 200_000,))
        writer.start()
        try:
            with pytest.raises(ArchiveError):
                served.remote.apply("a", "", cast("BinaryIO", stream))
        finally:
            os.set_blocking(read_fd, False)
            while writer.is_alive():
                with suppress(BlockingIOError):
                    os.read(read_fd, 1 << 20)
                time.sleep(0.01)
            writer.join()


def test_an_error_amid_a_diff_is_an_error(served, monkeypatch):
    served.remote.create("a")
    served.remote.apply("a", "", io.BytesIO(tar_of(one=os.urandom(1 << 20))))

    @contextmanager
    def diff(layer: str, parent: str = "") -> Iterator[BinaryIO]:
        yield io.BytesIO(bytes(1 << 20))
        raise OSError(5, "Input/output error", "/dev/loop0")

    monkeypatch.setattr(served.driver, "diff", diff)

    def read() -> None:
        with served.remote.diff("a") as stream:
            assert len(stream.read()) == 1 << 20

    with pytest.raises(OSError, match="Input/output error") as raised:
        read()
    assert raised.value.filename == "/dev/loop0"


def test_a_daemon_that_ends_amid_a_diff(served):
    served.remote.create("a")
    served.remote.apply("a", "", io.BytesIO(tar_of(one=os.urandom(64 << 20))))

    def read() -> None:
        with served.remote.diff("a") as stream:
            stream.read(1000)
            served.service.stop(0.1)
            stream.read()

    with pytest.raises(DaemonError, match="broke the request off"):
        read()
    served.await_release()
    with pytest.raises(DaemonError, match="does not answer"):
        served.remote.exists("a")


def test_a_layer_whose_maker_has_gone_is_taken_back(served, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    create = served.driver.create

    def slow(*args: Any, **kwargs: Any) -> None:
        entered.set()
        leave.wait(SECONDS)
        create(*args, **kwargs)

    monkeypatch.setattr(served.driver, "create", slow)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(served.path))
        client.sendall(post("/v1/create", b'{"layer": "a"}'))
        assert entered.wait(SECONDS)
    time.sleep(0.1)
    leave.set()
    removed = {"front_end": "control", "operation": "create"}
    value = served.operations.registry.get_sample_value
    wait_for(lambda: value("devmapper_operation_duration_seconds_count", removed))
    wait_for(lambda: not served.driver.exists("a"))


def test_a_tar_may_hold_frames(served):
    """What is in a tar is never taken for a frame."""
    body = pack(Kind.END) + pack_json(Kind.ERROR, {})
    assert read_frame(io.BytesIO(pack(Kind.DATA, body))).body == body


# Options


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("dm.basesize=8M",), None),
        (("dm.basesize=8388608", "dm.mkfsarg=-q"), None),
        (("dm.basesize=10G",), "dm.basesize '8388608', not '10G'"),  # which is the default
        (("dm.basesize=1G", "dm.basesize=8M"), None),
        (("dm.blocksize=128K",), "without dm.blocksize"),
        (("dm.mkfsarg=-q", "dm.mkfsarg=-v"), "dm.mkfsarg '-q', not with '-q -v'"),
        (("dm.fs=ntfs",), "expected ext4 or xfs"),
        (("dm.use_deferred_removal=true", "dm.use_deferred_deletion=true"), "removal"),
    ],
)
def test_options_that_the_daemon_does_not_have_are_refused(served, words, fragment):
    if fragment is None:
        served.remote.agree("auto", words, ())
        return
    with pytest.raises(UsageError) as raised:
        served.remote.agree("auto", words, ())
    assert fragment.replace("not with", "not") in str(raised.value).replace("not with", "not")


def test_engine_and_id_maps_that_the_daemon_does_not_have_are_refused(served):
    engine = served.local.engine().engine
    served.remote.agree(engine, (), ("0:0:65536",))
    with pytest.raises(UsageError, match=f"engine '{engine}', not 'kernel'"):
        served.remote.agree("kernel", (), ())
    with pytest.raises(UsageError, match="not '100000'"):
        served.remote.agree("auto", (), ("0:100000:65536",))
    with pytest.raises(UsageError, match="have no root"):
        served.remote.agree("auto", (), ("1:100000:10",))


# Who holds the graph


def test_a_daemon_is_found_by_its_lock(served):
    home = served.driver.home
    settings = Settings(root=home)
    assert cli_settings.at_daemon(settings) is None
    with lock.only_daemon(home, served.path):
        found = cli_settings.at_daemon(settings)
        assert found is not None
        assert found.info().driver == "devicemapper"
        with pytest.raises(GraphLocked) as raised:
            cli_settings.require_no_daemon(settings)
        assert f"process {os.getpid()}" in str(raised.value)
    cli_settings.require_no_daemon(settings)
    assert cli_settings.at_daemon(Settings(root=home / "nothing")) is None


def test_a_daemon_that_does_not_answer_is_named(served, monkeypatch):
    monkeypatch.setattr(cli_settings, "_ANSWER_SECONDS", 0.2)
    silent = served.path.with_name("silent.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(silent))
        listener.listen()  # as of a process that is stopped
        for path in (served.path.with_name("nobody.sock"), silent):
            with (
                lock.only_daemon(served.driver.home, path),
                pytest.raises(GraphLocked, match=f"process {os.getpid()}") as raised,
            ):
                cli_settings.at_daemon(Settings(root=served.driver.home))
            assert raised.value.exit_code == 4
            assert "does not answer" in raised.value.hint


def test_the_client_needs_nothing_of_the_daemons():
    code = (
        "import sys, devmapper.graph.remote;"
        "print(*sorted(set(sys.modules) & {'aiohttp', 'asyncio', 'prometheus_client', 'grpc',"
        " 'tarfile', 'zstandard', 'devmapper.driver'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# Owners


def belongs(served: Served, layer: str, **members: object) -> None:
    store = served.driver.devices.parts.graph.store
    record = store.load(LayerId(layer))
    assert record is not None
    store.save(LayerId(layer), record._replace(extra=tuple(members.items())))


@pytest.fixture(params=["local", "remote"])
def graph(request, served):
    return getattr(served, request.param)


def test_layers_of_docker_are_shown_and_not_removed(served, graph):
    served.driver.create("a", owner="docker")
    assert [row.belongs_to.owner for row in graph.layers()] == ["", "docker"]
    assert graph.inspect("a").row.belongs_to.owner == "docker"
    with pytest.raises(UsageError, match="layer 'a' belongs to docker") as raised:
        graph.remove("a")
    assert "--force" in raised.value.hint
    assert not graph.remove("a", force=True)


def test_snapshots_of_containerd_are_shown_and_left_alone(served, graph):
    graph.create("a")
    graph.create("root")
    snapshot = {
        "key": "k8s.io/1/web", "kind": "active", "parent": "", "labels": {},
        "created": 1, "updated": 1,
    }  # fmt: skip
    belongs(served, "a", owner="containerd", snapshot=snapshot)
    belongs(served, "root", owner="containerd", snapshot={**snapshot, "key": ""})
    shown = [str(row.belongs_to) for row in graph.layers()]
    assert shown == [
        "", "containerd: active snapshot 'k8s.io/1/web'", "containerd: root of all snapshots",
    ]  # fmt: skip
    touches: list[Callable[[], object]] = [
        lambda: graph.get("a"),
        lambda: graph.create("b", "a"),
        lambda: graph.apply("a", "", io.BytesIO(b"")),
        lambda: graph.changes("a"),
        lambda: graph.remove("a"),
        lambda: graph.remove("root", force=True),
    ]
    for touch in touches:
        with pytest.raises(UsageError):
            touch()
    assert not graph.remove("a", force=True)
    assert not graph.exists("a")


@pytest.mark.parametrize(
    "members",
    [{"owner": 5}, {"snapshot": []}, {"owner": None, "snapshot": "x"}, {"owner": {"a": 1}}],
)
def test_damaged_owners_are_nobody(served, members):
    served.remote.create("a")
    belongs(served, "a", **members)
    assert str(served.remote.inspect("a").row.belongs_to) == ""
    record = served.driver.devices.parts.graph.store.load(LayerId("a"))
    assert ownership_of(record).snapshot is None
