"""The harness of guests: what a command's end looks like from here, and that nothing stays."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_for
from tests.uml.boot import CHECKOUT, Machine
from tests.uml.guest import GuestTimedOut, LostKernel, run_in_uml, running

pytestmark = pytest.mark.uml

LIMIT = 120  # seconds; a boot takes two or three
PROGRAM = [sys.executable, "-m", "tests.uml"]


class Printed:
    """Takes what a guest's command prints."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, piece: bytes) -> None:
        self.data += piece

    @property
    def words(self) -> list[str]:
        return self.data.decode().split()


def run(
    script: str, machine: Machine | None = None, *, timeout: float = LIMIT
) -> tuple[int, Printed]:
    printed = Printed()
    status = run_in_uml(["sh", "-c", script], machine, timeout=timeout, output=printed)
    return status, printed


@pytest.fixture(autouse=True)
def no_folder_left() -> Iterator[None]:
    before = folders()
    yield
    assert folders() == before


def folders() -> set[Path]:
    """The folders of guests that this process has started; that of the kernel tier is one."""
    mine = f"dm-uml-{os.getpid()}-*"
    return {*Path("/var/tmp").glob(mine), *Path("/dev/shm").glob(mine)}


def descendants(pid: int) -> set[int]:
    """All processes below one, however deep."""
    below = {pid}
    parents = {
        int(path.name): int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        for path in Path("/proc").glob("[0-9]*")
        if path.joinpath("stat").exists()
    }
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {pid}


def test_a_command_in_a_guest_with_thin_pools_leaves_the_host_alone(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    script = f"""
        dmsetup targets | grep -c '^thin-pool '; test -b /dev/loop7 && echo loop
        df --output=fstype /scratch | tail -1; echo "$WORD $DM_DISABLE_UDEV"; pwd
        echo lost > {CHECKOUT}/written-by-a-guest; echo lost > /etc/written-by-a-guest
        mkdir -p {outside}; echo lost > {outside}/file
        echo kept > {inside}/file
        head -c 3000000 /dev/zero | tr '\\0' x; echo; echo end
        exit 3"""
    machine = Machine(disk=256, writable=(inside,), environment={"WORD": "it's $HOME"})
    status, printed = run(script, machine)
    assert status == 3
    assert printed.words[:7] == ["1", "loop", "ext4", "it's", "$HOME", "1", str(CHECKOUT)]
    assert printed.words[7:] == ["x" * 3_000_000, "end"]
    assert not (CHECKOUT / "written-by-a-guest").exists()
    assert not Path("/etc/written-by-a-guest").exists()
    assert not outside.exists()
    assert (inside / "file").read_text() == "kept\n"


def test_a_signal_is_a_status() -> None:
    assert run("kill -KILL $$")[0] == 128 + signal.SIGKILL


def test_udevd_on_request() -> None:
    # A link to the node is udev's work, a node of its own is libdevmapper's
    script = "dmsetup create ours --table '0 8 error' && test -L /dev/mapper/ours && echo udev"
    status, printed = run(script, Machine(udev=True))
    assert (status, printed.words) == (0, ["udev"])


@pytest.mark.parametrize(
    ("script", "console"),
    [
        pytest.param("busybox halt -f", "System halted", id="halt"),
        pytest.param("busybox reboot -f", "Restarting system", id="reboot"),
        pytest.param("echo c > /proc/sysrq-trigger", "Kernel panic", id="panic"),
    ],
)
def test_an_end_without_a_status_is_a_lost_kernel(script: str, console: str) -> None:
    with pytest.raises(LostKernel, match=console):
        run(script)


def test_out_of_time_ends_all_of_it() -> None:
    printed = Printed()
    with running(["sh", "-c", "echo up; while :; do :; done"], Machine(), output=printed) as guest:
        wait_for(lambda: printed.words == ["up"])
        below = descendants(guest.pid)
        assert len(below) > 2
        with pytest.raises(GuestTimedOut):
            guest.wait(0.5)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def test_a_guest_dies_with_its_starter(tmp_path: Path) -> None:
    command = [*PROGRAM, "run", "--", "sh", "-c", "echo up; while :; do :; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=CHECKOUT) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        below = descendants(starter.pid)
        assert len(below) > 2
        starter.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def test_the_shell_has_a_terminal_and_a_pool() -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (33, 99))
    before = termios.tcgetattr(slave)
    shell = subprocess.Popen(
        PROGRAM, stdin=slave, stdout=slave, stderr=slave, cwd=CHECKOUT, start_new_session=True
    )
    try:
        expect(master, b"uml:")
        os.write(master, b"""sh -c 'echo as""leep; read x'\n""")
        expect(master, b"asleep")
        os.write(master, b"\x03")  # reaches the command there, not us
        expect(master, b"uml:")
        os.write(master, b"stty size; dmsetup status --target thin-pool; exit 5\n")
        seen = expect(master, b"exit\r\n")
        assert shell.wait(LIMIT) == 5
        assert b"33 99" in seen
        assert b" thin-pool " in seen.partition(b"33 99")[2]
        assert termios.tcgetattr(slave) == before
    finally:
        shell.kill()
        shell.wait()
        os.close(slave)
        os.close(master)


def test_the_shell_ends_with_its_terminal() -> None:
    master, slave = pty.openpty()
    with subprocess.Popen(
        PROGRAM, stdin=slave, stdout=slave, stderr=subprocess.PIPE, cwd=CHECKOUT
    ) as shell:
        os.close(slave)
        try:
            expect(master, b"uml:")
            below = descendants(shell.pid)
        finally:
            os.close(master)
        assert shell.wait(LIMIT) != 0
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def expect(terminal: int, word: bytes) -> bytes:
    seen = b""
    while word not in seen:
        ready, _, _ = select.select([terminal], [], [], LIMIT / 4)
        assert ready, seen
        seen += os.read(terminal, 4096)
    return seen
