"""Programs that we run and processes that we watch.

The one place that starts a program.  A process is known by its id *and* its start time, so that a
signal never reaches a stranger who got the number later.
"""

import errno
import logging
import os
import select
import shlex
import shutil
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from devmapper.errors import EnvironmentLacking, ToolError

log = logging.getLogger(__name__)

_SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PACKAGES: Final[Mapping[str, str]] = {
    "blkid": "util-linux",
    "dmsetup": "dmsetup",
    "e2fsck": "e2fsprogs",
    "lvchange": "lvm2",
    "lvconvert": "lvm2",
    "lvcreate": "lvm2",
    "lvm": "lvm2",
    "lvs": "lvm2",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "pvcreate": "lvm2",
    "pvremove": "lvm2",
    "pvs": "lvm2",
    "resize2fs": "e2fsprogs",
    "thin_check": "thin-provisioning-tools",
    "thin_dump": "thin-provisioning-tools",
    "thin_repair": "thin-provisioning-tools",
    "thin_restore": "thin-provisioning-tools",
    "tune2fs": "e2fsprogs",
    "vgchange": "lvm2",
    "vgcreate": "lvm2",
    "vgremove": "lvm2",
    "vgs": "lvm2",
    "wipefs": "util-linux",
    "xfs_admin": "xfsprogs",
    "xfs_growfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
}


class CompletedRun(NamedTuple):
    """A program that has ended with a status that its caller can use."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: str


def find_tool(name: str) -> str:
    """Absolute path of a program; `EnvironmentLacking` says which package has it."""
    found = shutil.which(name, path=_SEARCH_PATH)
    if found is None:
        package = _PACKAGES.get(name)
        hint = f"install it: apt-get install {package}" if package else ""
        raise EnvironmentLacking(f"program {name!r} is not installed", hint=hint)
    return found


def run(
    argv: Sequence[str],
    *,
    input: bytes | None = None,  # noqa: A002 - as subprocess.run calls it
    ok: Collection[int] = (0,),
    pass_fds: Collection[int] = (),
    timeout: float | None = None,
) -> CompletedRun:
    """Run a program to its end and return what it printed.

    `ToolError` if its status is not in *ok*, if it died of a signal (status -N) or took longer than
    *timeout* seconds (it is killed; status -SIGKILL).
    """
    command = (find_tool(argv[0]), *argv[1:])
    log.debug("run %s", shlex.join(argv))
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL if input is None else None,
            input=input,
            capture_output=True,
            env=_environment(),
            check=False,
            pass_fds=tuple(pass_fds),
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as err:
        message = f"took longer than {timeout} seconds"
        raise ToolError(argv, -signal.SIGKILL, message) from err
    stderr = done.stderr.decode(errors="replace")
    if done.returncode not in ok:
        raise ToolError(argv, done.returncode, stderr)
    return CompletedRun(tuple(argv), done.returncode, done.stdout, stderr)


class ProcessIdentity(NamedTuple):
    """One process, told apart from later ones with the same id by its start time."""

    pid: int
    start_time: int  # clock ticks after boot, field 22 of /proc/<pid>/stat

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has *pid* now; `ProcessLookupError` if there is none."""
        return cls(pid, _start_time(pid))

    def alive(self) -> bool:
        """Whether this very process runs; a zombie does not."""
        try:
            return _start_time(self.pid) == self.start_time
        except ProcessLookupError:
            return False

    def send_signal(self, number: signal.Signals) -> bool:
        """Signal it; False if it has ended, whoever has its id now."""
        with _ProcessHandle(self) as handle:
            return handle is not None and _signal(handle, number)

    def wait(self, timeout: float) -> bool:
        """Wait until it has ended; False if it still runs after *timeout* seconds.

        It need not be a child of ours; a child's zombie is left for whoever waits for it.
        """
        with _ProcessHandle(self) as handle:
            if handle is None:
                return True
            ready, _, _ = select.select([handle], [], [], timeout)
            return bool(ready)


def spawn_detached(
    argv: Sequence[str],
    *,
    log_file: Path,
    pass_fds: Collection[int] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program that outlives this one: own session, `/` as directory, output to a log.

    *environment* is added to ours.  The caller is its parent as long as it lives, so that it can
    see it fail while it starts.
    """
    command = [find_tool(argv[0]) if "/" not in argv[0] else argv[0], *argv[1:]]
    log.debug("start %s", shlex.join(argv))
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            cwd="/",
            start_new_session=True,
            pass_fds=tuple(pass_fds),
            env={**os.environ, **(environment or {})},
        )
    finally:
        os.close(fd)


class _ProcessHandle:
    """A pidfd that is certain to stand for the process it was asked for."""

    def __init__(self, identity: ProcessIdentity) -> None:
        self._identity = identity
        self._fd: int | None = None

    def __enter__(self) -> int | None:
        try:
            self._fd = os.pidfd_open(self._identity.pid)
        except ProcessLookupError:
            return None
        # The start time is read after the pidfd was opened: from here on the id cannot be reused
        if not self._identity.alive():
            self.__exit__()
            return None
        return self._fd

    def __exit__(self, *_: object) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _signal(handle: int, number: signal.Signals) -> bool:
    try:
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    return True


def _start_time(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError) as err:
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from err
    # The command in parentheses may itself hold blanks and parentheses
    fields = text[text.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):
        raise ProcessLookupError(errno.ESRCH, "process has ended", str(pid))
    return int(fields[19])


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "PATH": _SEARCH_PATH}
