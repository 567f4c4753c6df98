"""A real containerd that has our daemon for a snapshotter, and the shims and containers it starts.

All of it runs in a control group of its own, so that killing reaches every process of it and no
other.  There is no network: images come from archives that are made here.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from devmapper.linux import mount
from tests.support import cgroup

SNAPSHOTTER: Final = "devmapper-serve"
NAMESPACE: Final = "e2e"
_SHIM_SOCKETS: Final = Path("/run/containerd/s")
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0
# What it can do without: CRI wants a network, the others look for tools and modules
_DISABLED: Final = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
)
_CONFIG: Final = """\
root = "{root}"
state = "{state}"
disabled_plugins = {disabled}
{tables}
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"
"""
_TABLES: Final = """\
version = 2
[proxy_plugins.{name}]
  type = "snapshot"
  address = "{snapshotter}"
"""


class Containerd:
    """One root directory and the containerd that has it, if one is running."""

    def __init__(self, root: Path, run: Path, group: cgroup.Group, snapshotter: Path) -> None:
        self.root = root
        self.folder = run  # what does not outlive the rig
        self.log = run / "containerd.log"
        self.socket = run / "c.sock"
        self._ctr = ("ctr", "--address", str(self.socket))
        self.config = run / "config.toml"
        self.namespace = NAMESPACE
        self.control_group = f"/{group.path.name}/containers"
        self.runc_root = run / "runc"
        self._group = group
        self._process: subprocess.Popen[bytes] | None = None
        self._ran: set[tuple[str, str]] = set()
        self.configure(_TABLES.format(name=SNAPSHOTTER, snapshotter=snapshotter))

    def configure(self, tables: str, disabled: Sequence[str] = _DISABLED) -> None:
        """Have its file say this besides what keeps it within the rig."""
        self.config.write_text(
            _CONFIG.format(
                root=self.root,
                state=self.folder / "state",
                disabled=json.dumps(disabled),
                socket=self.socket,
                opt=self.root / "opt",
                tables=tables,
            )
        )

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._process is None
        with self.log.open("ab") as log, self._group.entered("daemon"):
            self._process = subprocess.Popen(
                ["containerd", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=_environment(),
            )
        deadline = time.monotonic() + _START_SECONDS
        while self.tried("version")[0] != 0:
            ended = self._process.poll()
            assert ended is None, f"containerd ended with {ended}:\n{self.tail()}"
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGTERM; shims and containers go on."""
        process = self._own()
        process.terminate()
        assert process.wait(_STOP_SECONDS) == 0, self.tail()
        self._process = None

    def kill(self) -> None:
        """SIGKILL; shims and containers go on."""
        process = self._own()
        process.send_signal(signal.SIGKILL)
        process.wait(_STOP_SECONDS)
        self._process = None

    def ctr(self, *arguments: object, stdin: bytes = b"") -> str:
        """Run its command line; what it printed, without the last newline."""
        status, said, words = self.tried(*arguments, stdin=stdin)
        assert status == 0, f"ctr {' '.join(map(str, arguments))}: {words}\n{self.tail()}"
        return said.removesuffix("\n")

    def tried(self, *arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        """The same where it may fail: status, output, what it complains of."""
        done = subprocess.run(
            [*self._ctr, "--namespace", self.namespace, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            cwd=self.folder,
            env=_environment(),
            timeout=120,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def run(self, image: str, name: str, *command: str, options: Sequence[str] = ()) -> str:
        """`ctr run` of a container in our group; without `--detach` what it printed."""
        return self.ctr(
            "run", "--snapshotter", SNAPSHOTTER, *self.where(name), *options, image, name, *command
        )

    def where(self, name: str) -> list[str]:
        """Options that keep a container within this rig."""
        self.expect_shim(name)
        group = f"{self.control_group}/{name}"
        return ["--cgroup", group, "--runc-root", str(self.runc_root)]

    def expect_shim(self, name: str) -> None:
        """Look for the socket of this container's or pod's shim when the rig ends."""
        self._ran.add((self.namespace, name))

    def remove_shim_sockets(self) -> None:
        """Of shims that were killed; containerd has a place for them that cannot be chosen."""
        for namespace, name in self._ran:
            address = os.path.normpath(f"{self.socket}/{namespace}/{name}")
            digest = hashlib.sha256(address.encode()).hexdigest()
            (_SHIM_SOCKETS / digest).unlink(missing_ok=True)

    def exec(self, container: str, *command: str) -> str:
        """What a command in a running container prints."""
        number = f"x{time.monotonic_ns()}"
        return self.ctr("tasks", "exec", "--exec-id", number, container, *command)

    def import_image(self, archive: Path, name: str) -> None:
        self.ctr("images", "import", "--snapshotter", SNAPSHOTTER, "--base-name", name, archive)

    def snapshots(self) -> dict[str, tuple[str, str]]:
        """What containerd knows of: parent and kind by key."""
        lines = self.ctr("snapshots", "--snapshotter", SNAPSHOTTER, "ls").splitlines()[1:]
        found = {}
        for line in lines:
            key, *parent, kind = line.split()
            found[key] = ("".join(parent), kind)
        return found

    def collect_garbage(self) -> None:
        """Have it remove now what nobody refers to, by the end of a lease that is waited for.

        By itself it collects after fifty times as long as it took before, which on a busy machine
        is minutes; and what was removed while it collected it may not count as a reason
        (`gc/scheduler`).
        """
        lease = f"x{time.monotonic_ns()}"
        self.ctr("leases", "create", "--id", lease)
        self.ctr("leases", "rm", "--sync", lease)

    def state_of(self, container: str) -> str:
        """RUNNING, STOPPED, or empty without a task."""
        for line in self.ctr("tasks", "ls").splitlines()[1:]:
            name, _, state = line.split()
            if name == container:
                return state
        return ""

    def end(self, container: str) -> None:
        """Kill a container's task, and remove both."""
        self.ctr("tasks", "kill", "--signal", "SIGKILL", container)
        deadline = time.monotonic() + _STOP_SECONDS
        while self.state_of(container) == "RUNNING":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.ctr("tasks", "rm", container)
        self.ctr("containers", "rm", container)

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-30:])

    def _own(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process


@contextmanager
def containerd(folder: Path, snapshotter: Path) -> Iterator[Containerd]:
    """A containerd below *folder*, not started; at the end nothing of it runs or is mounted."""
    run = Path(tempfile.mkdtemp(prefix=f"dmt-{os.getpid()}-ctd-", dir="/run"))
    try:
        with cgroup.group(run.name) as group:
            rig = Containerd(folder / "containerd", run, group, snapshotter)
            try:
                yield rig
            except BaseException:
                print(rig.tail() if rig.log.exists() else "containerd was not started")
                raise
            finally:
                if rig.running:
                    rig.kill()
                group.kill()
                rig.remove_shim_sockets()
                _unmount_below(run)
    finally:
        shutil.rmtree(run)


def _unmount_below(folder: Path) -> None:
    points = [entry.mount_point for entry in mount.mountinfo()]
    for point in reversed([point for point in points if point.is_relative_to(folder)]):
        mount.unmount(point, flags=mount.UmountFlag.DETACH)


def _environment() -> dict[str, str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return {**os.environ, "PATH": path, "LC_ALL": "C"}


def write_oci_archive(
    target: Path,
    layers: Sequence[bytes],
    *,
    tag: str = "latest",
    env: Mapping[str, str] = {},
    command: Sequence[str] = (),
) -> list[str]:
    """An OCI image of *layers*, tars from the lowest to the topmost; returns their diff ids."""
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        media_type = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    packed = [blob(gzip.compress(layer, mtime=0), "layer.v1.tar+gzip") for layer in layers]
    diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    config = {
        "architecture": _architecture(),
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin", *(f"{name}={value}" for name, value in env.items())],
            "Cmd": list(command),
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": packed,
    }
    entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index = {"schemaVersion": 2, "manifests": [entry]}
    with tarfile.open(target, "w") as archive:
        _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(archive, "index.json", json.dumps(index).encode())
        for digest, content in blobs.items():
            _add(archive, f"blobs/sha256/{digest}", content)
    return diff_ids


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _architecture() -> str:
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """What containerd calls the snapshot of each layer: the OCI image specification's ChainID."""
    found: list[str] = []
    for diff_id in diff_ids:
        both = f"{found[-1]} {diff_id}" if found else diff_id
        found.append(f"sha256:{hashlib.sha256(both.encode()).hexdigest()}" if found else diff_id)
    return found
