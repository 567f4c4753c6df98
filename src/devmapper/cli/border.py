"""The one place where an error becomes words on stderr and an exit code.

A user never sees a traceback without `-v`.
"""

import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final, NamedTuple

from devmapper.cli.settings import Settings
from devmapper.errors import DevmapperError, EnvironmentLacking, UsageError

PROGRAM: Final = "devmapper"
INTERNAL_ERROR: Final = 70  # EX_SOFTWARE
_INTERRUPTED: Final = 128 + signal.SIGINT
_PIPE_CLOSED: Final = 128 + signal.SIGPIPE
_FAILED: Final = 1
_JOURNAL: Final = "JOURNAL_STREAM"  # environment: the journal may read what we print

_HINTS: Final = {
    errno.ENOSPC: "make room on the file system that holds it",
    errno.EDQUOT: "make room on the file system that holds it",
    errno.EROFS: "mount its file system for writing, or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


class Report(NamedTuple):
    """What a user is told about an error."""

    message: str
    hint: str
    exit_code: int


class Terminated(BaseException):
    """A signal that asks the process to end; what is half done is undone on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def obey_signals() -> None:
    """Let a request to end unwind what is half done, as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)


def run(command: Callable[[], int], settings: Settings) -> int:
    """Run *command* and return what the process ends with; nothing is raised."""
    try:
        status = command()
        # Here, so that a full disk under stdout is an error like any other
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
        return _PIPE_CLOSED
    except BaseException as err:  # noqa: BLE001 - the border of the program
        _abandon_stdout()
        return report(err, settings)
    return status


def report(error: BaseException, settings: Settings) -> int:
    """Tell the user, and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else _FAILED
    told = explain(error)
    expected = told.exit_code != INTERNAL_ERROR
    if settings.verbose > (1 if expected else 0):
        logging.getLogger(__name__).error("traceback:", exc_info=error)
    if settings.json:
        text = json.dumps(
            {"error": told.message, "hint": told.hint, "exit_code": told.exit_code},
            ensure_ascii=False,
        )
    else:
        text = f"{PROGRAM}: {told.message}" + (f"\nhint: {told.hint}" if told.hint else "")
    text = _for_the_journal(text)
    print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)
    return told.exit_code


def _for_the_journal(text: str) -> str:
    """With the priority of an error where the journal reads stderr, for `journalctl -p err`."""
    if _JOURNAL not in os.environ:
        return text
    from devmapper.server import logs

    return logs.prefixed(logging.ERROR, text) if logs.is_journal(sys.stderr, os.environ) else text


def explain(error: BaseException) -> Report:
    """Word an error; what was done about it meanwhile (its notes) is a part of the sentence."""
    told = _explain(error)
    message = "; ".join([told.message, *getattr(error, "__notes__", ())])
    return told._replace(message=" ".join(message.split()))


def _explain(error: BaseException) -> Report:
    match error:
        case DevmapperError():
            return Report(str(error), error.hint, error.exit_code)
        case KeyboardInterrupt():
            return Report("interrupted", "", _INTERRUPTED)
        case Terminated():
            return Report(f"ended by {signal.Signals(error.number).name}", "", 128 + error.number)
        case OSError():
            return _explain_os_error(error)
        case MemoryError():
            return Report("out of memory", "", _FAILED)
        case _:
            return _explain_foreign(error)


def _explain_foreign(error: BaseException) -> Report:
    if (usage := _usage_message(error)) is not None:
        return Report(usage, f"{PROGRAM} --help lists the commands", UsageError.exit_code)
    return Report(
        f"internal error: {type(error).__name__}: {error}",
        f"run it again as {PROGRAM} -v for the traceback, and report it",
        INTERNAL_ERROR,
    )


def _usage_message(error: BaseException) -> str | None:
    """What the command line's parser found wrong."""
    from typer.exceptions import TyperException

    if not isinstance(error, TyperException):
        return None
    message = error.format_message().strip().rstrip(".")
    return message[:1].lower() + message[1:]


def _explain_os_error(error: OSError) -> Report:
    reason = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    message = f"{' and '.join(map(repr, names))}: {reason}" if names else reason
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return Report(message, "run the command with sudo", EnvironmentLacking.exit_code)
    return Report(message, _HINTS.get(error.errno or 0, ""), _FAILED)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


def _abandon_stdout() -> None:
    """Keep the interpreter from flushing to a pipe or a disk that takes nothing any more."""
    try:
        sys.stdout.flush()
    except OSError:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
