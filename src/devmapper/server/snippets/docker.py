"""Docker's configuration: the plugin up to 27, containerd's snapshotter from 28 on.

A plugin is found by its socket's name in /run/docker/plugins or by a file in /etc/docker/plugins
(moby `docs/extend/plugin_api.md`).
"""

import json
from pathlib import Path
from typing import Any, Final

from devmapper.errors import UsageError
from devmapper.server.config import Config
from devmapper.server.snippets import containerd
from devmapper.server.snippets.snippet import Release, Snippet

FILE: Final = Path("/etc/docker/daemon.json")
LATEST: Final = Release(29)
_PLUGIN_SOCKETS: Final = Path("/run/docker/plugins")
_PLUGIN_FILES: Final = Path("/etc/docker/plugins")
_LAST_WITH_PLUGINS: Final = 27
_ASKS_FOR_VARIABLE: Final = 27  # before, plugins for storage were only deprecated
VARIABLE: Final = "DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS"


def takes_plugin(release: Release) -> bool:
    """Whether a Docker of *release* has plugins for storage; later ones have snapshotters only."""
    return release.major <= _LAST_WITH_PLUGINS


def driver_name(config: Config) -> str:
    """What Docker calls the plugin: the name of its socket's file."""
    return config.docker_socket.stem


def members(config: Config, release: Release, name: str = containerd.NAME) -> dict[str, Any]:
    """What daemon.json has to say."""
    if takes_plugin(release):
        return {"experimental": True, "storage-driver": driver_name(config)}
    return {
        "features": {"containerd-snapshotter": True},
        "storage-driver": containerd.check_name(name),
    }


def snippet(config: Config, release: Release | None, name: str = containerd.NAME) -> Snippet:
    """daemon.json for a Docker of *release*; None: it is not known here."""
    found = release or LATEST
    text = json.dumps(members(config, found, name), indent=2) + "\n"
    notes = [f"for Docker {found.major}" + ("" if release else ": none is installed here")]
    if takes_plugin(found):
        notes += _notes_for_plugin(config, found)
    else:
        if not config.containerd_enabled:
            notes.append(
                "devmapper serve has to serve containerd: [containerd] in its file, or --containerd"
            )
        notes.append(
            "dockerd uses the system's containerd, which needs: devmapper config containerd"
        )
    notes.append("restart Docker afterwards: systemctl restart docker")
    return Snippet(FILE, text, tuple(notes))


def _notes_for_plugin(config: Config, release: Release) -> list[str]:
    notes = []
    if not config.docker_enabled:
        notes.append("devmapper serve has to serve Docker: [docker] in its file, or --docker")
    socket = config.docker_socket
    if socket.parent != _PLUGIN_SOCKETS:
        place = _PLUGIN_FILES / f"{socket.stem}.spec"
        notes.append(f"Docker does not look there for plugins: write unix://{socket} into {place}")
    if release.major >= _ASKS_FOR_VARIABLE:
        notes.append(
            f"dockerd takes it with {VARIABLE}=1 in its environment only:"
            f" systemctl edit docker.service, [Service], Environment={VARIABLE}=1"
        )
    return notes


def lacking_in(file: Path, wanted: dict[str, Any]) -> list[str]:
    """What daemon.json does not say but should, in words; `UsageError` if it cannot be read."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as err:
        raise UsageError(f"{str(file)!r} cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise UsageError(f"{str(file)!r} is not JSON: {err}") from err
    if not isinstance(found, dict):
        raise UsageError(f"{str(file)!r} holds no object")
    return [
        f'"{key}": {json.dumps(value)}'
        for key, value in wanted.items()
        if not _has(found, key, value)
    ]


def _has(found: dict[str, Any], key: str, value: object) -> bool:
    there = found.get(key)
    if isinstance(value, dict):
        return isinstance(there, dict) and all(
            there.get(name) == each for name, each in value.items()
        )
    return there == value
