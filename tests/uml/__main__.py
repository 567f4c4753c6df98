"""`python -m tests.uml`: a shell in a guest; `python -m tests.uml run [options] -- COMMAND`."""

import argparse
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.uml.boot import HERE, Machine, Terminal, missing
from tests.uml.guest import Guest, LostKernel, run_in_uml, running


def main() -> int:
    options = _options().parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    reason = missing()
    if reason:
        print(f"uml: {reason}", file=sys.stderr)
        return 1
    machine = Machine(
        memory=options.mem,
        disk=options.disk,
        udev=options.udev,
        cgroup=options.cgroup,
        writable=tuple(path.resolve() for path in options.out),
        environment=dict(word.split("=", 1) for word in options.env),
        directory=Path.cwd(),
    )
    try:
        if options.action == "run":
            return run_in_uml(options.command, machine, timeout=options.timeout)
        return _shell(machine)
    except LostKernel as err:
        print(f"uml: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _shell(machine: Machine) -> int:
    if not sys.stdin.isatty():
        print("uml: standard input is no terminal; see `run`", file=sys.stderr)
        return 2
    size = os.get_terminal_size(0)
    terminal = Terminal(os.environ.get("TERM", "vt100"), size.lines or 24, size.columns or 80)
    argv = ["bash", "--rcfile", str(HERE / "shell.bash"), "-i"]
    with _raw_terminal(), running(argv, machine, output=_show, terminal=terminal) as guest:
        threading.Thread(target=_type, args=[guest], daemon=True).start()
        return guest.wait()


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Each key reaches the guest, whose terminal echoes and interprets it."""
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _type(guest: Guest) -> None:
    with suppress(OSError):
        while keys := os.read(0, 1024):
            guest.type(keys)
    guest.interrupt()  # the terminal is gone


def _show(piece: bytes) -> None:
    while piece:
        piece = piece[os.write(1, piece) :]


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.uml", description=__doc__)
    parser.set_defaults(action="shell")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--mem", default="3G", help="memory (default 3G)")
    common.add_argument("--disk", type=_mebibytes, default=0, help="ext4 at /scratch, like 4G")
    common.add_argument("--udev", action="store_true", help="with udevd")
    common.add_argument("--cgroup", action="store_true", help="with cgroup2 in /sys/fs/cgroup")
    common.add_argument(
        "--out", type=Path, action="append", default=[], help="folder that the guest may write"
    )
    common.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    for name, value in vars(common.parse_args([])).items():
        parser.set_defaults(**{name: value})
    actions = parser.add_subparsers()
    actions.add_parser("shell", parents=[common], help="a shell (the default)")
    run = actions.add_parser("run", parents=[common], help="one command, its output and status")
    run.add_argument("--timeout", type=float, help="seconds after which it is ended")
    run.add_argument("command", nargs="+")
    run.set_defaults(action="run")
    return parser


def _mebibytes(text: str) -> int:
    units = {"M": 1, "G": 1024}
    if text[-1:] not in units or not text[:-1].isdigit():
        raise argparse.ArgumentTypeError("a number with M or G")
    return int(text[:-1]) * units[text[-1]]


if __name__ == "__main__":
    sys.exit(main())
