"""The daemon's sockets and its HTTP service."""

import asyncio
import contextlib
import errno
import http.client
import itertools
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
from aiohttp import web

from devmapper.errors import UsageError
from devmapper.server import closing, sockets
from devmapper.server.connection import Connection
from devmapper.server.http import HttpService, TcpAddress
from devmapper.server.operations import Operations
from devmapper.server.refusal import plain
from tests.support.waiting import wait_for


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def get(path: Path, url: str) -> bytes:
    connection = _Connection(path)
    connection.request("GET", url)
    try:
        return connection.getresponse().read()
    finally:
        connection.close()


def test_listens_with_mode_0600_and_leaves_nothing(tmp_path):
    listener = sockets.listen(tmp_path / "a.sock")
    try:
        assert stat.S_IMODE((tmp_path / "a.sock").stat().st_mode) == 0o600
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.sock"]
        with pytest.raises(OSError, match="another process listens") as raised:
            sockets.listen(tmp_path / "a.sock")
        assert raised.value.errno == errno.EADDRINUSE
    finally:
        listener.close()
    sockets.listen(tmp_path / "a.sock").close()  # what a dead process left is replaced


def test_what_is_no_socket_is_not_replaced(tmp_path):
    file = tmp_path / "a.sock"
    file.write_text("precious")
    with pytest.raises(OSError, match="not a socket"):
        sockets.listen(file)
    assert file.read_text() == "precious"
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="not a socket"):
        sockets.listen(tmp_path / "link")


@pytest.mark.parametrize("path", ["relative.sock", "/" + "x" * 100])
def test_paths_that_no_socket_can_have(path):
    with pytest.raises(UsageError):
        sockets.listen(Path(path))


def test_only_our_own_socket_is_removed(tmp_path):
    path = tmp_path / "a.sock"
    first = sockets.listen(path)
    own = sockets.identity(path)
    first.close()
    second = sockets.listen(path)
    sockets.remove(path, own)
    assert path.exists()
    sockets.remove(path, sockets.identity(path))
    second.close()
    assert not path.exists()


def test_serves_and_lets_requests_under_way_end(tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        leave.wait(60)
        return "done"

    def application() -> web.Application:
        async def handle(request: web.Request) -> web.Response:
            return web.Response(text=await service.in_thread(slow))

        made = web.Application()
        made.router.add_get("/slow", handle)
        return made

    service = HttpService("test", tmp_path / "a.sock", application)
    service.start()
    answers: list[bytes] = []
    client = threading.Thread(target=lambda: answers.append(get(tmp_path / "a.sock", "/slow")))
    client.start()
    entered.wait(60)
    stopper = threading.Thread(target=service.stop, args=(10.0,))
    stopper.start()
    time.sleep(0.1)
    leave.set()
    stopper.join()
    client.join()
    assert answers == [b"done"]
    assert list(tmp_path.iterdir()) == []
    service.stop()


def test_no_request_is_lost_that_came_before_the_end(tmp_path):
    """Clients that send one after the other on a connection: each request that they could send
    was answered, though the service stops amid them."""

    def application() -> web.Application:
        async def handle(request: web.Request) -> web.Response:
            await request.read()
            return web.Response(body=b"{}")

        made = web.Application()
        made.router.add_post("/", handle)
        return made

    lost: list[Exception] = []
    answered: list[int] = []

    def client() -> None:
        connection = _Connection(tmp_path / "a.sock")
        with contextlib.closing(connection):
            for count in itertools.count():
                try:
                    connection.request("POST", "/", b"{}")
                except OSError:  # refused, or closed before it was sent: the client knows
                    answered.append(count)
                    return
                try:
                    connection.getresponse().read()
                except (http.client.HTTPException, OSError) as err:
                    lost.append(err)
                    return

    for _ in range(5):
        service = HttpService("test", tmp_path / "a.sock", application)
        service.start()
        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        time.sleep(0.1)
        service.stop(600.0)  # more than a test may take
        for thread in clients:
            thread.join()
    assert lost == []
    assert len(answered) == 40
    assert sum(answered) > 100


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", b"HTTP/1.1 200 OK"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{}", b""),  # never whole
        (b"POST / HT", b""),
        (b"", b""),
    ],
    ids=["whole", "half a body", "half a head", "nothing"],
)
def test_the_end_of_a_connection_is_one_moment_for_both_sides(tmp_path, sent, expected):
    """What is in the socket by then is answered, and nothing comes after it."""
    answered: list[bytes] = []

    async def handle(request: web.BaseRequest) -> web.Response:
        answered.append(await request.read())
        return web.Response()

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[Connection] = asyncio.Queue()
        server = web.Server(handle)

        def make() -> Connection:
            connection = Connection(
                server, plain, loop=loop, keep_alive=600.0, changed=lambda: None
            )
            made.put_nowait(connection)
            return connection

        async with await loop.create_unix_server(make, tmp_path / "a.sock"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "a.sock"))
                connection = await made.get()
                while connection.transport is None:
                    await asyncio.sleep(0)
                assert connection.is_new
                client.sendall(sent)  # which the loop, that is here, cannot have read
                connection.end()
                with pytest.raises(BrokenPipeError):
                    client.send(b"late")
                found = b""
                while piece := await asyncio.to_thread(client.recv, 4096):
                    found += piece
                return found

    found = asyncio.run(run())
    assert found.partition(b"\r\n")[0] == expected
    assert answered == ([b"{}"] if expected else [])


def test_who_has_just_connected_is_still_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(closing, "_LOOKS", 60_000)

    def application() -> web.Application:
        async def handle(request: web.Request) -> web.Response:
            return web.Response(body=b"answered")

        made = web.Application()
        made.router.add_get("/", handle)
        return made

    service = HttpService("test", tmp_path / "a.sock", application)
    service.start()
    with contextlib.closing(_Connection(tmp_path / "a.sock")) as client:
        client.connect()
        stopper = threading.Thread(target=service.stop, args=(120.0,))
        stopper.start()
        wait_for(lambda: not list(tmp_path.iterdir()), "others can connect")
        client.request("GET", "/")
        assert client.getresponse().read() == b"answered"
        stopper.join()


def sleeping() -> web.Application:
    """Answers nothing for a minute."""

    async def handle(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    made = web.Application()
    made.router.add_get("/", handle)
    return made


def test_stop_does_not_wait_for_ever(tmp_path):
    service = HttpService("test", TcpAddress("127.0.0.1", 0), sleeping)
    service.start()
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        service.stop(0.1)
        assert client.recv(1) == b""


def test_told_again_to_stop_it_waits_less(tmp_path):
    service = HttpService("test", TcpAddress("127.0.0.1", 0), sleeping)
    service.start()
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        patient = threading.Thread(target=service.stop, args=(600.0,))
        patient.start()
        time.sleep(0.2)
        assert patient.is_alive()
        service.stop(0.1)
        patient.join(60)
        assert not patient.is_alive()
        assert client.recv(1) == b""


def test_an_application_that_cannot_be_made(tmp_path):
    def application() -> web.Application:
        raise UsageError("no routes")

    service = HttpService("test", tmp_path / "a.sock", application)
    with pytest.raises(UsageError, match="no routes"):
        service.start()
    assert list(tmp_path.iterdir()) == []


def test_operations_are_counted():
    operations = Operations()
    with operations.measure("docker", "Create"):
        under_way = operations.registry.get_sample_value(
            "devmapper_operations_under_way", {"front_end": "docker", "operation": "Create"}
        )
    assert under_way == 1
    with pytest.raises(UsageError), operations.measure("docker", "Create"):
        raise UsageError("no")
    labels = {"front_end": "docker", "operation": "Create"}
    value = operations.registry.get_sample_value
    assert value("devmapper_operation_duration_seconds_count", labels) == 2
    assert value("devmapper_operation_errors_total", {**labels, "error": "UsageError"}) == 1
    assert value("devmapper_operations_under_way", labels) == 0
