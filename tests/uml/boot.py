"""What a guest is started with: its machine, the folder of its run, the kernel's command line.

The folder holds, for init.sh and session.sh: `settings` (shell assignments), `command` (a shell
script) and `lib/modules/<version>`, a tree with the index that Debian's package lacks.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent  # links do not lead into a guest's own /tmp
CHECKOUT: Final = HERE.parent.parent
KERNEL: Final = "linux.uml"
MODULES_ROOT: Final = Path("/usr/lib/uml/modules")
UDEVD: Final = "/lib/systemd/systemd-udevd"
MODULES: Final = (
    "dm-mod", "dm-thin-pool", "dm-snapshot", "dm-flakey", "dm-log-writes", "nbd", "fuse",
)  # fmt: skip
LOOP_DEVICES: Final = 32
SCRATCH: Final = Path("/scratch")
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_COVERED: Final = ("/tmp/", "/run/", "/mnt/", "/dev/", "/proc/", "/sys/")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A guest as its caller wants it.

    *memory* in the kernel's words.  *disk*: MiB of a sparse disk with ext4, mounted at /scratch; 0
    for none.  *writable*: folders of the host that the guest may change, at the same path there;
    all else that it writes is lost with it.  *environment* is added to a small one of our own,
    nothing else is inherited.
    """

    memory: str = "3G"
    disk: int = 0
    udev: bool = False
    cgroup: bool = False
    writable: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path = CHECKOUT


@dataclass(frozen=True)
class Terminal:
    """The kind and the size of the caller's terminal, for a command that wants one."""

    name: str
    rows: int
    columns: int


def prepare(
    run: Path, machine: Machine, argv: Sequence[str], terminal: Terminal | None
) -> list[str]:
    """Fill the folder *run*; returns the words that start the kernel, its lines aside."""
    version = _kernel_version()
    _link_modules(run, version)
    disk = _make_disk(run, machine.disk) if machine.disk else None
    for path in (run, *machine.writable):
        if set(str(path)) & set(",\n"):
            raise ValueError(f"a comma or line break in {str(path)!r}: can't be mounted in a guest")
    settings = {
        "HERE": str(HERE),
        "KERNEL": version,
        "EARLY_MODULES": "overlay",
        "MODULES": " ".join(MODULES),
        "LOOPS": str(LOOP_DEVICES),
        "NAME": "uml",
        "KEPT": "\n".join(map(str, _kept(run, machine))),
        "WRITABLE": "\n".join(str(path.resolve()) for path in machine.writable),
        "CGROUP": "1" if machine.cgroup else "",
        "UDEV": "1" if machine.udev else "",
        "DISK": "/dev/ubda" if disk else "",
        "TERMINAL": terminal.name if terminal else "",
        "ROWS": str(terminal.rows) if terminal else "",
        "COLUMNS": str(terminal.columns) if terminal else "",
    }
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in settings.items()]
    # A checkout's path may hold what the kernel's command line can't
    (run / "init.sh").symlink_to(HERE / "init.sh")
    (run / "settings").write_text("".join(lines))
    (run / "command").write_text(_command(machine, argv, terminal))
    return [
        KERNEL,
        f"mem={machine.memory}",
        f"uml_dir={run}",
        *([f"ubd0={disk}"] if disk else []),
        "root=none", "rootfstype=hostfs", "rootflags=/", "ro",
        # A guest that is broken has to end, at once and without success
        "oops=panic", "panic=-1", "noreboot",
        "init=/bin/sh", f"RUN={run}", "--", f"{run}/init.sh",
    ]  # fmt: skip


def _command(machine: Machine, argv: Sequence[str], terminal: Terminal | None) -> str:
    real = Path(sys.executable).resolve().parent
    environment = {
        # The interpreter itself before all else: pyenv's shims fork a lot, which is slow there
        "PATH": f"{Path(sys.executable).parent}:{real}:{_SYSTEM_PATH}",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        **({} if machine.udev else {"DM_DISABLE_UDEV": "1"}),
        **({"TERM": terminal.name} if terminal else {}),
        **machine.environment,
    }
    words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), *argv]
    # No exec: this shell turns death by a signal into 128 + its number
    return f"cd {shlex.quote(str(machine.directory))} || exit 125\n{shlex.join(words)}\nexit $?\n"


def _kept(run: Path, machine: Machine) -> list[Path]:
    wanted = {
        CHECKOUT, run, machine.directory, Path(sys.prefix), Path(sys.base_prefix),
        Path(sys.executable).resolve().parent,
    }  # fmt: skip
    return sorted(path for path in wanted if f"{path}/".startswith(_COVERED))


def _kernel_version() -> str:
    done = subprocess.run([KERNEL, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _link_modules(run: Path, version: str) -> None:
    tree = run / "lib" / "modules" / version
    tree.mkdir(parents=True)
    packaged = MODULES_ROOT / version
    for name in ("kernel", "modules.order", "modules.builtin", "modules.builtin.modinfo"):
        (tree / name).symlink_to(packaged / name)
    subprocess.run(["depmod", "-b", str(run), version], check=True, env=_system_environment())


def _make_disk(run: Path, mebibytes: int) -> Path:
    path = run / "scratch.ext4"
    with path.open("xb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(path)],
        check=True, env=_system_environment(),
    )  # fmt: skip
    return path


def _system_environment() -> dict[str, str]:
    return {"PATH": _SYSTEM_PATH, "LC_ALL": "C"}


def missing() -> str:
    """What keeps this machine from booting a guest, "" if nothing does."""
    if os.geteuid() != 0:
        return "not root"
    packages = {
        KERNEL: "user-mode-linux", "depmod": "kmod", "modprobe": "kmod", "mkfs.ext4": "e2fsprogs",
        "busybox": "busybox-static", "unshare": "util-linux", "setpriv": "util-linux",
    }  # fmt: skip
    for program, package in packages.items():
        if shutil.which(program, path=_SYSTEM_PATH) is None:
            return f"{program} is not installed (Debian: {package})"
    return ""
