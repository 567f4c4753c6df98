"""A real dockerd, on its devicemapper driver or a plugin; its containerd and its shims.

All of it runs in a control group of its own, so that killing reaches every process of it and no
other.  There is no network: nothing of the machine's is touched.
"""

import http.client
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from devmapper.linux import mount
from tests.support import cgroup
from tests.support.debian import HERE, Programs

DEVICEMAPPER: Final = "devicemapper"
STORAGE_OPTIONS: Final = (
    "dm.fs=ext4",
    "dm.loopdatasize=1G",
    "dm.loopmetadatasize=16M",
    "dm.basesize=64M",
    "dm.override_udev_sync_check=true",
)
BUSYBOX: Final = Path("/bin/busybox")  # Debian: busybox-static
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0


class Dockerd:
    """One data root and the dockerd that has it, if one is running."""

    def __init__(
        self,
        data_root: Path,
        run: Path,
        group: cgroup.Group,
        driver: str,
        programs: Programs,
        containerd: Path | None,
    ) -> None:
        self.programs = programs
        self.containerd = containerd
        self.data_root = data_root
        self.driver = driver
        self.home = data_root / "devicemapper"
        self.log = run / "dockerd.log"
        self._run = run
        self._group = group
        self._socket = run / "api"
        self._process: subprocess.Popen[bytes] | None = None
        self._shim_sockets: set[Path] = set()  # of shims that were killed
        self.was_killed = False

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self, *options: str) -> None:
        """Start it on the data root and wait until it answers; *options* are storage options.

        Its own driver gets STORAGE_OPTIONS as well; a plugin's graph has been made already.
        """
        given = STORAGE_OPTIONS if self.driver == DEVICEMAPPER else ()
        assert self._process is None
        notify = self._run / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(notify))
            try:
                with self.log.open("ab") as log, self._group.entered("daemon"):
                    self._process = subprocess.Popen(
                        self._command((*given, *options)),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        cwd=self._run,
                        env={**self.programs.environment(), "NOTIFY_SOCKET": str(notify)},
                    )
                self._wait_until_ready(ready)
            finally:
                notify.unlink()
        assert self.request("GET", "/_ping")[0] == 200

    def stop(self) -> None:
        """SIGTERM, as an init system does it: containers stop, the pool is let go."""
        process = self._own()
        process.terminate()
        status = process.wait(_STOP_SECONDS)
        self._process = None
        assert status == 0, self.tail()
        self._group.wait_until_empty(_STOP_SECONDS)

    def kill(self, *, containers: bool = True) -> None:
        """SIGKILL: everything of it in one go, or, without *containers*, dockerd alone.

        Its containerd goes with it (it asks the kernel for that), shims and containers go on.
        """
        process = self._own()
        self.was_killed = True
        if containers:
            self.end_all()
        else:
            process.send_signal(signal.SIGKILL)
        process.wait(_STOP_SECONDS)
        # Where the first process of the machine reaps nobody, the next dockerd takes the dead one
        # for a containerd that runs
        (self._run / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)
        self._process = None

    def kill_containers(self) -> None:
        """End what a dockerd that was killed alone has left running."""
        assert self._process is None
        self.end_all()

    def end_all(self) -> None:
        """SIGKILL to whatever runs of it."""
        # Shims remove them themselves; containerd has a place for them that cannot be chosen
        for address in self._run.glob("exec/containerd/daemon/*.task/*/*/address"):
            self._shim_sockets.add(Path(address.read_text().removeprefix("unix://")))
        self._group.kill()

    def remove_shim_sockets(self) -> None:
        """Remove what shims have left that were killed."""
        for left in self._shim_sockets:
            left.unlink(missing_ok=True)

    def docker(
        self, *arguments: str, stdin: bytes = b"", check: bool = True, buildkit: bool = False
    ) -> str:
        """Run Docker's command line; what it printed, without the last newline."""
        done = subprocess.run(
            self.programs.argv("docker", "--host", f"unix://{self._socket}", *arguments),
            input=stdin,
            capture_output=True,
            env={
                **self.programs.environment(),
                "DOCKER_CONFIG": str(self._run / "config"),
                "DOCKER_BUILDKIT": str(int(buildkit)),
            },
            timeout=120,
        )
        words = done.stderr.decode()
        assert done.returncode == 0 or not check, f"docker {arguments[0]}: {words}\n{self.tail()}"
        return done.stdout.decode().removesuffix("\n") if done.returncode == 0 else words

    def first_line_of(self, container: str) -> str:
        """What a running container prints first, however long that takes to come."""
        following = subprocess.Popen(
            self.programs.argv(
                "docker", "--host", f"unix://{self._socket}", "logs", "--follow", container
            ),
            stdout=subprocess.PIPE,
            env={
                **self.programs.environment(),
                "DOCKER_CONFIG": str(self._run / "config"),
                "DOCKER_BUILDKIT": "0",
            },
        )
        with following:
            assert following.stdout is not None
            try:
                return following.stdout.readline().decode().removesuffix("\n")
            finally:
                following.kill()

    def export(self, container: str, target: Path) -> Path:
        """What `docker export` says of a container, in the file *target*."""
        self.docker("export", "--output", str(target), container)
        return target

    def layer_of(self, container: str) -> str:
        """The id of a container's layer, from Docker's layer store."""
        inspected = json.loads(self.docker("inspect", container))[0]
        return layer_of(self.data_root, str(inspected["Id"]), self.driver)

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """One request to the API: status and reply; `OSError` if nobody answers (any more)."""
        connection = _Connection(self._socket)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            raw = reply.read()
        except http.client.HTTPException as err:
            message = f"{method} {path}: {err!r}"
            raise ConnectionError(message) from err
        finally:
            connection.close()
        is_json = (reply.getheader("Content-Type") or "").startswith("application/json")
        return reply.status, json.loads(raw) if is_json and raw else raw

    def tail(self) -> str:
        """The last lines of dockerd's log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-20:])

    def _own(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def _command(self, options: tuple[str, ...]) -> list[str]:
        command = [
            *self.programs.argv("dockerd"),
            *("--data-root", str(self.data_root)),
            *("--exec-root", str(self._run / "exec")),
            *("--pidfile", str(self._run / "pid")),
            *("--host", f"unix://{self._socket}"),
            *("--cgroup-parent", f"/{self._group.path.name}/containers"),
            *("--config-file", str(self._run / "daemon.json")),
            *("--storage-driver", self.driver),
            *([] if self.driver == DEVICEMAPPER or self.containerd else ["--experimental"]),
            *(["--containerd", str(self.containerd)] if self.containerd else []),
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
            "--ip-forward=false",
            "--ip-masq=false",
        ]
        for option in options:
            command += ["--storage-opt", option]
        return command

    def _wait_until_ready(self, ready: socket.socket) -> None:
        """dockerd tells its init system (sd_notify(3)) when it serves its API."""
        process = self._own()
        deadline = time.monotonic() + _START_SECONDS
        end = os.pidfd_open(process.pid)
        try:
            while True:
                left = deadline - time.monotonic()
                found, _, _ = select.select([ready.fileno(), end], [], [], max(0.0, left))
                if ready.fileno() in found and b"READY=1" in ready.recv(4096).split(b"\n"):
                    return
                if end in found or not found:
                    break
        finally:
            os.close(end)
        self.kill()
        raise AssertionError(f"dockerd did not start:\n{self.tail()}")


class _Connection(http.client.HTTPConnection):
    """HTTP on a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("docker", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


@contextmanager
def data_root(
    folder: Path,
    driver: str = DEVICEMAPPER,
    programs: Programs = HERE,
    containerd: Path | None = None,
) -> Iterator[Dockerd]:
    """A data root below *folder*; at the end nothing of it runs, is mounted or active.

    *driver* may be the name of a plugin, whose graph is its own affair, or, for a Docker that keeps
    its images in the *containerd* with that socket, the name of a snapshotter there.
    """
    run = Path(tempfile.mkdtemp(prefix=f"dmt-{os.getpid()}-docker-", dir="/run"))
    features = {"features": {"containerd-snapshotter": True}} if containerd else {}
    (run / "daemon.json").write_text(json.dumps(features))
    if programs.root is not None:
        (run / "config" / "cli-plugins").mkdir(parents=True)
        (buildx,) = programs.argv("docker-buildx")
        (run / "config" / "cli-plugins" / "docker-buildx").symlink_to(buildx)
    try:
        with cgroup.group(run.name) as group:
            rig = Dockerd(folder / "docker", run, group, driver, programs, containerd)
            try:
                yield rig
            finally:
                if rig.running:
                    rig.kill()
                rig.end_all()
                rig.remove_shim_sockets()
                unmount_below(run)
                unmount_below(folder)
                remove_devices(rig.home, was_killed=rig.was_killed)
    finally:
        shutil.rmtree(run)


def layer_of(root: Path, container_id: str, driver: str = DEVICEMAPPER) -> str:
    """The layer of a container in the graph at *root*, by its full id."""
    mounts = root / "image" / driver / "layerdb" / "mounts"
    return (mounts / container_id / "mount-id").read_text()


def unmount_below(folder: Path) -> None:
    """Unmount what a dockerd that was killed has left below *folder*, and on it."""
    real = Path(os.path.realpath(folder))
    points = [entry.mount_point for entry in mount.mountinfo()]
    for point in reversed([point for point in points if point.is_relative_to(real)]):
        mount.unmount(point, flags=mount.UmountFlag.DETACH)


def remove_devices(home: Path, *, was_killed: bool = False) -> None:
    """Remove the graph's devices and its pool from the kernel, as they are.

    A dockerd that *was_killed* may have removed a device, and not its node in /dev/mapper yet.
    """
    if not home.exists():
        return
    from devmapper.deviceset.names import GraphNames

    prefix = GraphNames.of(home).prefix
    active = _dmsetup("info", "-c", "--noheadings", "-o", "name")
    ours = [name for name in active if name.startswith(f"{prefix}-")]
    for name in sorted(ours, key=lambda name: name.endswith("-pool")):
        _dmsetup("remove", name)
    if was_killed:
        _dmsetup("mknodes")  # which removes those without a device, too


def _dmsetup(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["dmsetup", *arguments], capture_output=True, text=True, env=HERE.environment(), timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line != "No devices found"]


def busybox_tar(files: "dict[str, bytes] | None" = None) -> bytes:
    """A root file system of busybox alone and of *files*, as a tar for `docker import`."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("bin", "etc", "tmp", "dev", "proc", "sys"):
            _add(archive, name, tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
        _add(archive, "bin/busybox", tarfile.REGTYPE, content=BUSYBOX.read_bytes(), mode=0o755)
        for name in ("sh", "cat", "echo", "ls", "ln", "rm", "mknod", "sleep", "dd", "chmod"):
            _add(archive, f"bin/{name}", tarfile.SYMTYPE, target="busybox")
        for name, content in (files or {}).items():
            _add(archive, name, tarfile.REGTYPE, content=content)
    return packed.getvalue()


def _add(
    archive: tarfile.TarFile,
    name: str,
    kind: bytes,
    *,
    content: bytes = b"",
    mode: int = 0o644,
    target: str = "",
) -> None:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.mode = mode
    member.size = len(content)
    member.linkname = target
    member.mtime = 1_600_000_000
    archive.addfile(member, io.BytesIO(content))
