"""containerd's configuration: the daemon as a proxy plugin, and CRI's snapshotter.

Sources: containerd `docs/PLUGINS.md` (proxy plugins), `docs/cri/config.md` (both versions of the
file), `services/server/config` (`imports`).
"""

import glob
import json
import platform
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any, Final

from devmapper.errors import UsageError
from devmapper.server.config import Config
from devmapper.server.snippets.snippet import Release, Snippet

FILE: Final = Path("/etc/containerd/config.toml")
NAME: Final = "devmapper-serve"
LATEST: Final = Release(2, 1)
_NAME: Final = re.compile(r"[A-Za-z0-9]+(?:[-._][A-Za-z0-9]+)*", re.ASCII)
_MAX_NAME: Final = 76  # containerd `pkg/identifiers`
_BUILT_IN: Final = frozenset(
    {"aufs", "blockfile", "btrfs", "devmapper", "erofs", "native", "overlayfs", "zfs"}
)
_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_IMAGES: Final = Path("/var/lib/containerd/io.containerd.snapshotter.v1")  # and a dot and the name
_CRI: Final = ("io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri")


def check_name(name: str) -> str:
    """`UsageError` for a name that containerd refuses, or one of its own snapshotters has."""
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise UsageError(
            f"name {name!r} is not fit for a snapshotter: letters, digits and single '-', '.', '_'"
        )
    if name in _BUILT_IN:
        raise UsageError(
            f"name {name!r} is that of a snapshotter of containerd's own: it would not start",
            hint=f"choose another one, such as {NAME}",
        )
    return name


def snippet(config: Config, release: Release | None, name: str = NAME) -> Snippet:
    """The tables for the file of a containerd of *release*; None: it is not known here."""
    check_name(name)
    found = release or LATEST
    how = f"release {release}" if release else "none is installed here"
    head = [f"# For containerd {found.major}.x ({how}); merge it into {FILE}"]
    if not config.containerd_enabled:
        head.append("# devmapper serve has to serve it: [containerd] in its file, or --containerd")
    proxy = [
        f"[proxy_plugins.{_key(name)}]",
        '  type = "snapshot"',
        f"  address = {_string(config.containerd_socket)}",
    ]
    if found.major >= 2:
        head.append("version = 3")
        proxy += [f'  platform = "{_platform()}"']
    else:
        head.append("version = 2")
    proxy += [
        f"  [proxy_plugins.{_key(name)}.exports]",
        f"    root = {_string(config.root)}",
    ]
    tail = _for_cri(found, name)
    notes = [
        "restart containerd afterwards: systemctl restart containerd",
        f"ctr and nerdctl take it with --snapshotter {name}",
    ]
    if found.major < 2:
        notes.append(
            "containerd before 1.6.32 and 1.7.16 does not read exports; for the room that is left a"
            f" kubelet looks elsewhere then: ln -s {quote(str(config.root))} {_IMAGES}.{name}"
        )
    return Snippet(FILE, "\n".join([*head, "", *proxy, "", *tail]) + "\n", tuple(notes))


def _for_cri(release: Release, name: str) -> list[str]:
    if release.major < 2:
        return [
            "# Kubernetes: what pods run on",
            f'[plugins."{_CRI[1]}".containerd]',
            f'  snapshotter = "{name}"',
        ]
    return [
        "# Kubernetes: what pods run on",
        f'[plugins."{_CRI[0]}"]',
        f'  snapshotter = "{name}"',
        "",
        "# Images that the transfer service pulls",
        '[[plugins."io.containerd.transfer.v1.local".unpack_config]]',
        f'  platform = "{_platform()}"',
        f'  snapshotter = "{name}"',
    ]


def proxies_at(file: Path, socket: Path) -> list[str]:
    """The names under which containerd's *file* has the daemon's *socket*; `UsageError`."""
    found: dict[str, None] = {}
    for tree in _trees(file):
        proxies = _table(tree, "proxy_plugins")
        for name, value in proxies.items():
            plugin = value if isinstance(value, dict) else {}
            address = str(plugin.get("address", "")).removeprefix("unix://")
            if plugin.get("type") == "snapshot" and address == str(socket):
                found[name] = None
    return list(found)


def cri_snapshotter(file: Path) -> str:
    """The snapshotter of CRI in containerd's *file*; "" where it is left to containerd."""
    chosen = ""
    for tree in _trees(file):
        plugins = _table(tree, "plugins")
        for cri in _CRI:
            table = _table(plugins, cri)
            for place in (table, _table(table, "containerd")):
                value = place.get("snapshotter")
                chosen = value if isinstance(value, str) and value else chosen
    return chosen


def _trees(file: Path) -> Iterator[dict[str, Any]]:
    """The file and what it imports, in the order in which later ones win."""
    tree = _read(file)
    yield tree
    for pattern in tree.get("imports", []):
        place = str(pattern)
        if not place.startswith("/"):
            place = str(file.parent / place)
        for name in sorted(glob.glob(place)):  # noqa: PTH207 - the pattern is absolute
            yield _read(Path(name))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as err:
        raise UsageError(f"{str(file)!r} cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise UsageError(f"{str(file)!r} is not TOML: {err}") from err


def _table(tree: dict[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _platform() -> str:
    machine = platform.machine()
    return f"linux/{_MACHINES.get(machine, machine)}"


def _key(name: str) -> str:
    return name if "." not in name else f'"{name}"'


def _string(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)
