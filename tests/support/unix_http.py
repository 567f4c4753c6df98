"""HTTP over a unix socket, as Docker's client and Prometheus speak it."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def docker_call(path: Path, endpoint: str, **members: str) -> dict[str, Any]:
    """One request to Docker's plugin; the members of its reply."""
    connection = UnixConnection(path)
    try:
        connection.request("POST", f"/{endpoint}", body=json.dumps(members))
        return dict(json.loads(connection.getresponse().read()))
    finally:
        connection.close()
