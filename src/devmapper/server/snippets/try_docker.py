"""Trying the plugin as dockerd uses it: activate, create, get, write, put, remove."""

import http.client
import json
import secrets
import socket as sockets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from devmapper.server.config import Config
from devmapper.server.snippets import docker
from devmapper.server.snippets.snippet import Release
from devmapper.server.snippets.trial import (
    Step,
    TrialFailed,
    daemon_runs,
    socket_is_there,
    tried,
    until_one_fails,
)

_SECONDS: Final = 30.0
_LARGEST_REPLY: Final = 1 << 20
_REPAIR: Final = "the daemon's log says more: journalctl -u devmapper"
_ACCEPT: Final = "application/vnd.docker.plugins.v1.2+json"


def steps(config: Config, file: Path, release: Release) -> Iterator[Step]:
    """The daemon's side until something fails, and Docker's own file in any case."""
    plugin = config.docker_socket
    yield from until_one_fails(
        lambda: daemon_runs(config.root),
        lambda: socket_is_there(plugin, "--docker"),
        lambda: tried("answer", lambda: _activates(plugin), _REPAIR),
        lambda: tried("scratch layer", lambda: _scratch(plugin), _REPAIR),
    )
    yield docker_is_told(file, docker.members(config, release))


def docker_is_told(file: Path, wanted: dict[str, Any]) -> Step:
    """Whether daemon.json says what is wanted."""

    def look() -> str:
        lacking = docker.lacking_in(file, wanted)
        if lacking:
            raise TrialFailed(f"{str(file)!r} lacks {', '.join(lacking)}")
        return f"{str(file)!r} says what it should"

    return tried("Docker's file", look, "devmapper config docker prints what belongs there")


def _activates(plugin: Path) -> str:
    reply = _call(plugin, "Plugin.Activate", {})
    if "GraphDriver" not in (reply.get("Implements") or ()):
        raise TrialFailed(f"it is no storage driver: it answers {json.dumps(reply)[:200]}")
    return "it is a storage driver"


def _scratch(plugin: Path) -> str:
    """Make a layer, mount it, write a file, unmount it, and remove it."""
    layer = {"ID": f"devmapper-check-{secrets.token_hex(8)}"}
    _call(plugin, "GraphDriver.Create", {**layer, "Parent": ""})
    try:
        directory = Path(str(_call(plugin, "GraphDriver.Get", {**layer, "MountLabel": ""})["Dir"]))
        try:
            (directory / "scratch").write_text("written by devmapper config docker --check\n")
        finally:
            _call(plugin, "GraphDriver.Put", layer)
    except BaseException:
        with suppress(TrialFailed, OSError):  # the first error says more
            _call(plugin, "GraphDriver.Remove", layer)
        raise
    _call(plugin, "GraphDriver.Remove", layer)
    return f"made, mounted at {str(directory)!r}, written and removed"


def _call(plugin: Path, endpoint: str, members: dict[str, str]) -> dict[str, Any]:
    """One request; `TrialFailed` for what is no reply, and for what the reply says is wrong."""
    connection = http.client.HTTPConnection("localhost", timeout=_SECONDS)
    connection.sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    connection.sock.settimeout(_SECONDS)
    try:
        connection.sock.connect(str(plugin))
        body = json.dumps(members).encode()
        connection.request("POST", f"/{endpoint}", body=body, headers={"Accept": _ACCEPT})
        reply = json.loads(connection.getresponse().read(_LARGEST_REPLY))
    except (http.client.HTTPException, ValueError) as err:
        raise TrialFailed(f"{endpoint}: its answer is none of a plugin's: {err}") from err
    finally:
        connection.close()
    if not isinstance(reply, dict):
        raise TrialFailed(f"{endpoint}: its answer is no object")
    if reply.get("Err"):
        raise TrialFailed(f"{endpoint}: {reply['Err']}")
    return reply
