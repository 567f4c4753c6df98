"""Single requests of the plugin protocol, right and wrong, as moby `pkg/plugins` sends them."""

import http.client
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.unix_http import UnixConnection

ACCEPT = "application/vnd.docker.plugins.v1.2+json"


class Reply(NamedTuple):
    status: int
    body: bytes
    content_type: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json.get("Err", ""))


class PluginClient:
    """One connection for each request."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def __call__(self, call: str, **members: object) -> Any:
        """A call that has to succeed; what it replied."""
        reply = self.send(f"/GraphDriver.{call}", json.dumps(members).encode())
        assert (reply.status, reply.json.get("Err", "")) == (200, "")
        return reply.json

    def error(self, call: str, **members: object) -> str:
        """A call that has to fail, as Docker understands it."""
        reply = self.send(f"/GraphDriver.{call}", json.dumps(members).encode())
        assert reply.status == 200
        assert reply.error
        return reply.error

    def send(
        self,
        url: str,
        body: bytes | Iterable[bytes] = b"{}",
        *,
        method: str = "POST",
        accept: str | None = ACCEPT,
    ) -> Reply:
        connection = UnixConnection(self.socket)
        try:
            headers = {} if accept is None else {"Accept": accept}
            connection.request(method, url, body, headers)
            reply = connection.getresponse()
            return Reply(reply.status, reply.read(), reply.headers["Content-Type"])
        finally:
            connection.close()

    def diff(self, layer: str, parent: str = "") -> bytes:
        reply = self.send("/GraphDriver.Diff", json.dumps({"ID": layer, "Parent": parent}).encode())
        assert reply.status == 200, reply.body
        return reply.body

    def apply(self, layer: str, tar: bytes | Iterable[bytes], parent: str = "") -> Reply:
        return self.send(f"/GraphDriver.ApplyDiff?id={layer}&parent={parent}", tar)

    def begin_diff(self, layer: str) -> tuple[UnixConnection, http.client.HTTPResponse]:
        """Send the request and read nothing of the tar yet."""
        connection = UnixConnection(self.socket)
        connection.request("POST", "/GraphDriver.Diff", json.dumps({"ID": layer}))
        return connection, connection.getresponse()
