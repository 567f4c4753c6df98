"""A real systemd: process 1 of namespaces of its own, with our unit as it is packaged.

Its units are in a folder of the test: Debian's own that a boot cannot do without, and ours.  So
there is no udev, no network and no login, and a boot takes a second.  Mounts of others reach it and
none of its own leave it; devices and loop devices are the machine's.
"""

import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support import capabilities, cgroup
from tests.support.command import PROGRAM, SMALL
from tests.support.thin_tools import thin_check
from tests.support.unix_http import docker_call
from tests.support.waiting import wait_for

UNIT: Final = Path(__file__).parents[2] / "packaging" / "devmapper.service"
HOME: Final = "/var/lib/devmapper"
SERVICE: Final = "devmapper.service"
DOCKER: Final = "/run/docker/plugins/devmapper.sock"
CONTAINERD: Final = "/run/devmapper/containerd.sock"
_SETUP: Final = Path(__file__).with_name("systemd.sh")
PACKAGED: Final = Path("/lib/systemd/system")  # Debian's units
_UNITS: Final = (
    "sysinit.target", "basic.target", "local-fs-pre.target", "local-fs.target", "sockets.target",
    "timers.target", "paths.target", "slices.target", "swap.target", "multi-user.target",
    "shutdown.target", "umount.target", "final.target", "poweroff.target",
    "systemd-poweroff.service", "systemd-journald.socket",
)  # fmt: skip
_LOG: Final = ("systemd-journald.service", "systemd-journald-dev-log.socket")
_BOOT_SECONDS: Final = 90.0
_END_SECONDS: Final = 90.0
WAIT_SECONDS: Final = 90.0
_PAUSE: Final = 0.2


class Systemd:
    """One that has booted, or ended since."""

    def __init__(self, units: Path, process: "subprocess.Popen[bytes]", pid: int) -> None:
        self._process = process
        self._pid = pid  # of process 1, as we see it
        self._units = units

    def path(self, path: str | Path) -> Path:
        """A path of its processes, for us."""
        return Path(f"/proc/{self._pid}/root{path}")

    def run(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        """Run a program beside its services; how it ended is in the result."""
        return subprocess.run(
            ["nsenter", f"--target={self._pid}", "--mount", "--pid", "--cgroup", "--uts", *argv],
            capture_output=True, text=True, timeout=_END_SECONDS * 2, check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "SYSTEMD_COLORS": "0"},
        )  # fmt: skip

    def __call__(self, *argv: str) -> str:
        """Run a program and demand success; what it printed."""
        done = self.run(*argv)
        assert done.returncode == 0, (argv, done.stdout, done.stderr, self.journal())
        return done.stdout

    def systemctl(self, *words: str) -> str:
        return self("systemctl", "--no-pager", *words)

    def show(self, unit: str, *properties: str) -> list[str]:
        """Properties of a unit, in the order in which they are asked for."""
        told = self.systemctl("show", f"--property={','.join(properties)}", unit)
        found = dict(line.split("=", 1) for line in told.splitlines())
        return [found[name] for name in properties]

    def main_pid(self) -> int:
        """The daemon's process id there, 0 if there is none."""
        return int(self.show(SERVICE, "MainPID")[0])

    def journal(self, *words: str) -> str:
        """The journal's messages, or those that *words* select."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", *words).stdout

    def logged(self, *words: str) -> list[str]:
        """The daemon's own messages, without anything before them."""
        self("journalctl", "--sync")
        return self(
            "journalctl", "--no-pager", "--quiet", "--output=cat",
            f"_SYSTEMD_UNIT={SERVICE}", *words,
        ).splitlines()  # fmt: skip

    def drop_in(self, text: str, unit: str = SERVICE) -> None:
        """Add lines to a unit; `systemctl edit` does the same."""
        folder = self._units / f"{unit}.d"
        folder.mkdir(exist_ok=True)
        (folder / f"{len(list(folder.iterdir()))}.conf").write_text(text)
        self.systemctl("daemon-reload")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for what nobody tells us of; to ask costs the guest's one processor a lot."""

        def holds() -> bool:
            if condition():
                return True
            time.sleep(_PAUSE)
            return False

        wait_for(holds, lambda: f"not {what}:\n{self.journal()}", WAIT_SECONDS)

    def docker(self, call: str, **members: str) -> str:
        """A call of Docker's that has to succeed; the directory, where it gives one."""
        reply = docker_call(self.path(DOCKER), f"GraphDriver.{call}", **members)
        assert not reply.get("Err"), reply
        return str(reply.get("Dir", ""))

    def is_mounted(self, path: str) -> bool:
        """Whether process 1 sees a mount at *path*."""
        lines = Path(f"/proc/{self._pid}/mountinfo").read_text().splitlines()
        return any(line.split()[4] == path for line in lines)

    def power_off(self) -> None:
        """What `systemctl poweroff` does; returns when all of it has ended."""
        os.kill(self._pid, signal.SIGRTMIN + 4)
        self._process.wait(_END_SECONDS)

    @property
    def running(self) -> bool:
        return self._process.poll() is None


def config(engine: str, *, containerd: bool = False, **lines: str) -> str:
    """A file of the daemon: a small pool, Docker's plugin, and more keys before the tables."""
    options = [*SMALL, *(["dm.override_udev_sync_check=true"] if engine == "kernel" else [])]
    words = ", ".join(f'"{option}"' for option in options)
    more = "".join(f'{name.replace("_", "-")} = "{value}"\n' for name, value in lines.items())
    tables = "[docker]\n[containerd]\n" if containerd else "[docker]\n"
    return f'engine = "{engine}"\nstorage-opts = [{words}]\n{more}{tables}'


@contextmanager
def booted(
    rig: Path,
    file: str,
    *,
    units: Mapping[str, str] | None = None,
    enabled: Sequence[str] = (),
) -> Iterator[Systemd]:
    """A systemd that has booted; afterwards its processes are gone, and the pool is let go.

    *rig* is a new folder on a disk; `graph` in it is /var/lib/devmapper there.  *file* is the
    daemon's configuration, *units* are more units, *enabled* those that a boot starts.  The pool's
    metadata are looked at by thin_check.  Who powers it off lets the pool go: a container's systemd
    leaves it active.
    """
    _fill(rig, file, units or {}, enabled)
    name = f"dmt-{os.getpid()}-systemd"
    with cgroup.group(name) as group, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"\0{name}")
        process = _start(rig, group, ready=f"@{name}")
        try:
            try:
                pid = _await_boot(process, ready)
            except BaseException:
                print((rig / "console").read_text(errors="replace"))
                raise
            machine = Systemd(rig / "units", process, pid)
            try:
                yield machine
            except BaseException:
                print(machine.journal() if machine.running else "it has ended")
                raise
            finally:
                if machine.running:
                    machine.systemctl("stop", SERVICE)
                    if machine.path(HOME).joinpath("metadata").is_dir():
                        machine("/usr/bin/devmapper", "engine", "stop", "--force")
        finally:
            group.kill()
            process.wait(_END_SECONDS)
    metadata = rig / "graph" / "devicemapper" / "metadata"
    if metadata.exists() and not capabilities.tools():
        checked = thin_check(metadata)
        assert checked, checked.output


def _fill(rig: Path, file: str, units: Mapping[str, str], enabled: Sequence[str]) -> None:
    for name in ("units", "graph", "none", "over/etc/devmapper", "over/usr/bin"):
        (rig / name).mkdir(parents=True)
    for name in (*_UNITS, *_LOG):
        shutil.copy(PACKAGED / name, rig / "units")
    shutil.copy(UNIT, rig / "units")
    for name, text in units.items():
        (rig / "units" / name).write_text(text)
    for target, wanted in (("sysinit.target", _LOG), ("multi-user.target", enabled)):
        (rig / f"units/{target}.wants").mkdir()
        for name in wanted:
            (rig / f"units/{target}.wants/{name}").symlink_to(f"../{name}")
    (rig / "over/etc/devmapper/config.toml").write_text(file)
    # The program that the unit names is the one under test
    program = rig / "over/usr/bin/devmapper"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    program.chmod(0o755)


def _start(rig: Path, group: cgroup.Group, *, ready: str) -> "subprocess.Popen[bytes]":
    with (rig / "console").open("wb") as console, group.entered("machine"):
        return subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *("unshare", "--pid", "--mount", "--cgroup", "--uts", "--fork"),
                *("--kill-child=KILL", "--propagation=slave", "--"),
                *("sh", str(_SETUP)),
            ],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console, cwd="/",
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "RIG": str(rig), "READY": ready,
            },
        )  # fmt: skip


def _await_boot(process: "subprocess.Popen[bytes]", ready: socket.socket) -> int:
    """Wait until process 1 has told that the boot is over; returns its id, as we see it."""
    deadline = time.monotonic() + _BOOT_SECONDS
    while True:
        found, _, _ = select.select([ready], [], [], 0.2)
        if found and b"READY=1" in ready.recv(4096).split(b"\n"):
            break
        assert process.poll() is None, "systemd has ended"
        assert time.monotonic() < deadline, "systemd does not boot"
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
