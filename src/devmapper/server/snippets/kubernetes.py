"""A DaemonSet that runs the daemon on each node, with its file in a ConfigMap.

No namespace is named: `kubectl apply -n` chooses it.  The pod is what a process of the node would
be: the devices it makes are the node's, and what it mounts is seen there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Final

from devmapper.engine.runtime import runtime_base
from devmapper.server.address import TcpAddress
from devmapper.server.config import Config, LogFormat, to_toml
from devmapper.server.snippets.snippet import Snippet
from devmapper.server.snippets.yaml import Value, documents

IMAGE: Final = "devmapper:latest"
NAME: Final = "devmapper"
_CONFIG: Final = Path("/etc/devmapper")
_METRICS_PORT: Final = 9273
_GRACE_SECONDS: Final = 15
_LABELS: Final[dict[str, Value]] = {"app.kubernetes.io/name": NAME}


def snippet(config: Config, image: str = IMAGE) -> Snippet:
    """The manifest; the node's containerd needs its own snippet besides."""
    effective = _on_a_node(config)
    notes = [
        f"the image {image!r} has to hold this program, util-linux and e2fsprogs or xfsprogs",
        "containerd on each node needs: devmapper config containerd",
    ]
    if config.engine == "embedded":
        notes.append(
            "the embedded engine would end with its pod, under running containers: engine is"
            ' "kernel" here'
        )
    text = documents([_config_map(effective), _daemon_set(effective, image)])
    return Snippet(Path("devmapper.yaml"), text, tuple(notes))


def _on_a_node(config: Config) -> Config:
    """The same with what only a pod needs.

    The kernel keeps the pool when the pod is replaced, where the process of the embedded engine
    would end with it.
    """
    address = config.metrics_address
    port = address.port if isinstance(address, TcpAddress) else _METRICS_PORT
    return replace(
        config,
        engine="kernel",
        containerd_enabled=True,
        docker_enabled=False,
        metrics_enabled=True,
        metrics_address=TcpAddress("0.0.0.0", port),  # noqa: S104 - the pod's own network
        log_format=LogFormat.TEXT,
    )


def _config_map(config: Config) -> Value:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{NAME}-config", "labels": _LABELS},
        "data": {"config.toml": to_toml(config)},
    }


def _daemon_set(config: Config, image: str) -> Value:
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": NAME, "labels": _LABELS},
        "spec": {
            "selector": {"matchLabels": _LABELS},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": _LABELS},
                "spec": {
                    # Whoever keeps a layer busy is a process of the node
                    "hostPID": True,
                    # udev's cookies are semaphores that the node's udevd decrements
                    "hostIPC": True,
                    "priorityClassName": "system-node-critical",
                    "tolerations": [{"operator": "Exists"}],
                    "terminationGracePeriodSeconds": int(config.stop_time) + _GRACE_SECONDS,
                    "containers": [_container(config, image)],
                    "volumes": _volumes(config),
                },
            },
        },
    }


def _container(config: Config, image: str) -> Value:
    address = config.metrics_address
    port = address.port if isinstance(address, TcpAddress) else _METRICS_PORT
    return {
        "name": "serve",
        "image": image,
        "command": ["devmapper", "serve", "--config", str(_CONFIG / "config.toml")],
        "securityContext": {"privileged": True},
        "ports": [{"name": "metrics", "containerPort": port}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": "metrics"}},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}},
        "volumeMounts": _volume_mounts(config),
    }


def _volume_mounts(config: Config) -> list[Value]:
    mounts: list[Value] = [{"name": "config", "mountPath": str(_CONFIG), "readOnly": True}]
    for name, path, _ in _host_paths(config):
        mounted: dict[str, Value] = {"name": name, "mountPath": str(path)}
        if name == "graph":
            mounted["mountPropagation"] = "Bidirectional"  # layers are mounted below it
        if name == "modules":
            mounted["readOnly"] = True
        mounts.append(mounted)
    return mounts


def _volumes(config: Config) -> list[Value]:
    volumes: list[Value] = [{"name": "config", "configMap": {"name": f"{NAME}-config"}}]
    for name, path, kind in _host_paths(config):
        volumes.append({"name": name, "hostPath": {"path": str(path), "type": kind}})
    return volumes


def _host_paths(config: Config) -> list[tuple[str, Path, str]]:
    """Names, places and kinds of what is the node's."""
    paths = [
        ("graph", config.root, "DirectoryOrCreate"),
        ("run", runtime_base(), "DirectoryOrCreate"),
        ("dev", Path("/dev"), "Directory"),
        ("udev", Path("/run/udev"), "Directory"),
        ("modules", Path("/lib/modules"), "Directory"),
    ]
    places = [config.containerd_socket, *([config.control_socket] if config.control_socket else [])]
    for number, directory in enumerate(dict.fromkeys(place.parent for place in places)):
        if directory != runtime_base():
            paths.append((f"sockets-{number}", directory, "DirectoryOrCreate"))
    return paths
