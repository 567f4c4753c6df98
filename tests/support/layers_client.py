"""A client of Docker's graphdriver plugin: what dockerd sends, on a connection of its own."""

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.unix_http import UnixConnection

SECONDS = 150.0  # a write to a full pool waits for a minute
_ACCEPT = {"Accept": "application/vnd.docker.plugins.v1.2+json"}


class PluginError(Exception):
    """The plugin's answer: its `Err`, and the status that it came with."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class PluginClient:
    """For one thread.  Methods raise `PluginError`; `OSError` and `HTTPException` where the
    connection is lost, which is made anew by the next call."""

    def __init__(self, path: Path) -> None:
        self._connection = UnixConnection(path, SECONDS)

    def call(self, name: str, **members: Any) -> dict[str, Any]:
        """A request in JSON; `None` as a member is left out."""
        known = {key: value for key, value in members.items() if value is not None}
        return self._json(f"/{name}", json.dumps(known).encode())

    def create(self, layer: str, parent: str = "", size: str = "") -> None:
        options = {"size": size} if size else None
        self.call("GraphDriver.CreateReadWrite", ID=layer, Parent=parent, StorageOpt=options)

    def remove(self, layer: str) -> None:
        self.call("GraphDriver.Remove", ID=layer)

    def get(self, layer: str) -> Path:
        return Path(self.call("GraphDriver.Get", ID=layer)["Dir"])

    def put(self, layer: str) -> None:
        self.call("GraphDriver.Put", ID=layer)

    def exists(self, layer: str) -> bool:
        return bool(self.call("GraphDriver.Exists", ID=layer)["Exists"])

    def changes(self, layer: str, parent: str) -> dict[str, int]:
        """Kinds by path: 0 modified, 1 added, 2 deleted."""
        found = self.call("GraphDriver.Changes", ID=layer, Parent=parent)["Changes"]
        return {change["Path"]: change["Kind"] for change in found or ()}

    def apply_diff(self, layer: str, parent: str, tar: bytes) -> int:
        path = f"/GraphDriver.ApplyDiff?id={layer}&parent={parent}"
        return int(self._json(path, tar)["Size"])

    @contextmanager
    def diff(self, layer: str, parent: str) -> Iterator[http.client.HTTPResponse]:
        """The tar as it comes; what is not read is dropped with the connection."""
        with self._answer() as connection:
            body = json.dumps({"ID": layer, "Parent": parent}).encode()
            connection.request("POST", "/GraphDriver.Diff", body, _ACCEPT)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise PluginError(response.status, json.loads(response.read())["Err"])
            yield response
            if not response.isclosed():
                connection.close()

    def close(self) -> None:
        self._connection.close()

    def _json(self, path: str, body: bytes) -> dict[str, Any]:
        with self._answer() as connection:
            connection.request("POST", path, body, _ACCEPT)
            response = connection.getresponse()
            found: dict[str, Any] = json.loads(response.read())
        if found.get("Err") or response.status != http.client.OK:
            raise PluginError(response.status, found["Err"])
        return found

    @contextmanager
    def _answer(self) -> Iterator[http.client.HTTPConnection]:
        try:
            yield self._connection
        except BaseException:
            self._connection.close()
            raise
