"""What is no HTTP: each service answers in its own form, in whole, and closes the connection."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from devmapper.driver import Driver
from devmapper.server.control.service import ControlService
from devmapper.server.docker.service import DockerPlugin
from devmapper.server.metrics.service import MetricsService
from devmapper.server.operations import Operations
from tests.support.graphs import open_small
from tests.support.local_engine import LocalEngine

SECONDS = 20.0
CREATE = {"docker": b"/GraphDriver.Create", "control": b"/v1/create", "metrics": b"/metrics"}
NAMED = {"docker": b'{"ID":"half"}', "control": b'{"layer":"half"}', "metrics": b""}


class Served(NamedTuple):
    name: str
    socket: Path
    driver: Driver

    def error(self, body: bytes) -> str:
        """The sentence of an error in the service's own form."""
        if self.name == "docker":
            (found,) = json.loads(body).items()
            assert found[0] == "Err"
            return str(found[1])
        if self.name == "control":
            told = json.loads(body)["error"]
            assert (told["class"], told["exit_code"]) == ("UsageError", 2)
            return str(told["message"])
        return body.decode().removesuffix("\n")


@pytest.fixture(params=["docker", "control", "metrics"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    engine = LocalEngine()
    path = tmp_path / "s"
    with Driver(open_small(tmp_path / "graph", engine)) as driver:
        makers: dict[str, Callable[[], DockerPlugin | ControlService | MetricsService]] = {
            "docker": lambda: DockerPlugin(driver, path, Operations()),
            "control": lambda: ControlService(driver, None, Operations(), path),
            "metrics": lambda: MetricsService(driver, None, Operations(), path),
        }
        service = makers[request.param]()
        service.start()
        try:
            yield Served(request.param, path, driver)
        finally:
            service.stop(5.0)
    engine.crash()


def said(path: Path, *pieces: bytes) -> bytes:
    """All that the service says to *pieces*, until it closes the connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(path))
        for piece in pieces:
            client.sendall(piece)
        found = bytearray()
        try:
            while data := client.recv(65536):
                found += data
        except TimeoutError:
            raise AssertionError(found) from None
    return bytes(found)


def answers(text: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, header and body of each answer; all of them are whole, and nothing is behind them."""
    found = []
    while text:
        head, separator, rest = text.partition(b"\r\n\r\n")
        assert separator, text
        line, *fields = head.decode().split("\r\n")
        header = {
            name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)
        }
        length = int(header["content-length"])
        assert len(rest) >= length
        found.append((int(line.split()[1]), header, rest[:length]))
        text = rest[length:]
    return found


def post(served: Served, *fields: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join(
        [b"POST " + CREATE[served.name] + b" HTTP/1.1", b"Host: d", *fields, b"", body]
    )


WRONG = {
    "no HTTP at all": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a word": b"hello\r\n\r\n",
    "a version of the future": b"POST / HTTP/9.9\r\nHost: d\r\n\r\n",
    "a header without a colon": b"POST / HTTP/1.1\r\nHost d\r\n\r\n",
    "a zero in a header": b"POST / HTTP/1.1\r\nHost: d\x00d\r\n\r\n",
    "a long line": b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: d\r\n\r\n",
    "a long header": b"POST / HTTP/1.1\r\nHost: d\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": b"POST / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
    "no length": b"POST / HTTP/1.1\r\nHost: d\r\nContent-Length: many\r\n\r\n",
    "a negative length": b"POST / HTTP/1.1\r\nHost: d\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "length and chunks":
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_no_http_is_one_error_in_the_services_form(served, text):
    ((status, _, body),) = answers(said(served.socket, text))
    assert status == 400
    sentence = served.error(body)
    assert sentence.startswith("the request is not HTTP: ")
    assert len(sentence) < 300
    assert "\n" not in sentence


def test_a_request_before_it_is_answered(served):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(served.socket))
        client.sendall(post(served, b"Content-Length: 2", body=b"{}"))
        before = client.recv(65536)
        assert before.startswith(b"HTTP/1.1 40")  # it names no layer
        client.sendall(b"hello\r\n\r\n")
        found = bytearray()
        while data := client.recv(65536):
            found += data
    *_, (status, _, body) = answers(before + bytes(found))
    assert status == 400
    assert served.error(body).startswith("the request is not HTTP: ")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "chunk", [b"zz\r\n", b"-5\r\n", b"fffffffffffffffffff\r\n", b"2\r\n{}}}\r\n"]
)
@pytest.mark.parametrize("served", ["docker", "control"], indirect=True)
def test_a_body_whose_chunks_are_wrong_does_nothing(served, chunk, split):
    named = NAMED[served.name]
    head = post(served, b"Transfer-Encoding: chunked")
    pieces = [head, b"%x\r\n%s\r\n" % (len(named), named), chunk]
    text = said(served.socket, *pieces) if split else said(served.socket, b"".join(pieces))
    found = answers(text)
    assert len(found) == 1, text
    assert found[0][0] == 400
    assert served.error(found[0][2])
    assert served.driver.layers() == []
