"""A client of Kubernetes' Container Runtime Interface: what a kubelet asks containerd for.

Its messages are compiled from `cri.proto` when they are needed.
"""

import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import grpc

from tests.support.containerd import Containerd

NAMESPACE: Final = "k8s.io"  # containerd's, of all that CRI makes
SECONDS: Final = 120.0
_PROTO: Final = Path(__file__).with_suffix(".proto")
_RUNTIME: Final = "runtime.v1.RuntimeService"
_IMAGES: Final = "runtime.v1.ImageService"
_SERVICE: Final = {
    name: _IMAGES if name in ("ListImages", "RemoveImage", "ImageFsInfo") else _RUNTIME
    for name in (
        "Status", "RunPodSandbox", "StopPodSandbox", "RemovePodSandbox", "CreateContainer",
        "StartContainer", "StopContainer", "RemoveContainer", "ExecSync", "ContainerStats",
        "ListContainerStats", "ListImages", "RemoveImage", "ImageFsInfo",
    )
}  # fmt: skip
# What a test changes in the file: no registry to pull from, no network, usage looked at often; and
# a machine may keep its root from lowering oom_score_adj, which needs CAP_SYS_RESOURCE
_TABLES: Final = """\
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  stats_collect_period = 1
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{folder}/cni/bin"
    conf_dir = "{folder}/cni/conf"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "{runc}"
"""
# Snapshotters of containerd's own that look for tools and modules
_DISABLED: Final = tuple(
    f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs")
)


def configure(rig: Containerd, snippet: str, pause: str) -> None:
    """Have *rig* run pods: with *snippet*, what our command prints, and *pause* for their image."""
    rig.namespace = NAMESPACE
    tables = _TABLES.format(pause=pause, folder=rig.folder, runc=rig.runc_root)
    rig.configure(f"{snippet}\n{tables}", _DISABLED)


@functools.cache
def messages() -> ModuleType:
    """The module of the messages."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        status = protoc.main(
            ["protoc", f"-I{_PROTO.parent}", f"--python_out={folder}", str(_PROTO)]
        )
        assert status == 0, status
        spec = importlib.util.spec_from_file_location("cri_pb2", f"{folder}/cri_pb2.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    return made


class Cri:
    """Pods in the node's own network, which needs no plugin; `grpc.RpcError` from every method."""

    def __init__(self, channel: grpc.Channel, rig: Containerd) -> None:
        self._channel = channel
        self._rig = rig
        self._configs: dict[str, Any] = {}

    def call(self, method: str, **fields: Any) -> Any:
        """Send the request of *method* with these fields."""
        request = getattr(messages(), f"{method}Request")(**fields)
        invoke: Callable[..., Any] = self._channel.unary_unary(
            f"/{_SERVICE[method]}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=getattr(messages(), f"{method}Response").FromString,
        )
        return invoke(request, timeout=SECONDS)

    def conditions(self) -> dict[str, bool]:
        return {each.type: each.status for each in self.call("Status").status.conditions}

    def config(self) -> dict[str, Any]:
        """What it has understood of its file."""
        found: dict[str, Any] = json.loads(self.call("Status", verbose=True).info["config"])
        return found

    def run_pod(self, name: str) -> str:
        """Start a pod; its id."""
        api = messages()
        options = api.NamespaceOption(network=api.NODE, ipc=api.NODE)
        config = api.PodSandboxConfig(
            metadata=api.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default"),
            linux=api.LinuxPodSandboxConfig(
                cgroup_parent=self._rig.control_group,
                security_context=api.LinuxSandboxSecurityContext(namespace_options=options),
            ),
        )
        pod: str = self.call("RunPodSandbox", config=config).pod_sandbox_id
        self._rig.expect_shim(pod)
        self._configs[pod] = config
        return pod

    def run_container(self, pod: str, name: str, image: str, *command: str) -> str:
        """Start a container in a pod; its id."""
        api = messages()
        pod_config = self._configs[pod]
        options = pod_config.linux.security_context.namespace_options
        config = api.ContainerConfig(
            metadata=api.ContainerMetadata(name=name),
            image=api.ImageSpec(image=image),
            command=command,
            linux=api.LinuxContainerConfig(
                security_context=api.LinuxContainerSecurityContext(namespace_options=options)
            ),
        )
        found: str = self.call(
            "CreateContainer", pod_sandbox_id=pod, config=config, sandbox_config=pod_config
        ).container_id
        self.call("StartContainer", container_id=found)
        return found

    def exec(self, container: str, *command: str) -> str:
        """What a command prints that has to succeed."""
        done = self.call("ExecSync", container_id=container, cmd=command, timeout=60)
        assert done.exit_code == 0, done
        said: str = done.stdout.decode()
        return said.removesuffix("\n")

    def written(self, container: str) -> int:
        """Bytes that a container has written, as a kubelet sees it."""
        stats = self.call("ContainerStats", container_id=container).stats
        (listed,) = (
            each
            for each in self.call("ListContainerStats").stats
            if each.attributes.id == container
        )
        assert listed.writable_layer.fs_id == stats.writable_layer.fs_id
        found: int = stats.writable_layer.used_bytes.value
        return found

    def image_file_system(self) -> tuple[Path, int, int]:
        """Where images and containers are; bytes and inodes of all of them."""
        (found,) = self.call("ImageFsInfo").image_filesystems
        return Path(found.fs_id.mountpoint), found.used_bytes.value, found.inodes_used.value

    def images(self) -> set[str]:
        return {tag for image in self.call("ListImages").images for tag in image.repo_tags}

    def remove_image(self, name: str) -> None:
        self.call("RemoveImage", image=messages().ImageSpec(image=name))

    def end(self, pod: str) -> None:
        """Stop a pod and remove it, and with it its containers."""
        self.call("StopPodSandbox", pod_sandbox_id=pod)
        self.call("RemovePodSandbox", pod_sandbox_id=pod)


@contextmanager
def connected(rig: Containerd) -> Iterator[Cri]:
    with grpc.insecure_channel(f"unix:{rig.socket}") as channel:
        yield Cri(channel, rig)
