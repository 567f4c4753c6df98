"""Signals that ask the daemon to end, as something that its main thread can wait for."""

import os
import select
import signal
import threading
from types import FrameType, TracebackType
from typing import Final, Self

_ASK: Final = (signal.SIGTERM, signal.SIGINT)
_IGNORED: Final = (signal.SIGHUP,)  # there is nothing to read again: a restart interrupts nobody
_WAKE: Final = b"\0"  # no signal has this number


class EndRequests:
    """A context, of the main thread, in which signals interrupt nothing: they wait to be asked for.

    Handlers are used and no mask or SIG_IGN: programs that are started meanwhile, the engine's
    process among them, would inherit these.
    """

    def __init__(self) -> None:
        self._reader = self._writer = -1
        self._guard = threading.Lock()  # between `wake` and the end of the pipe
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._wakeup_before = -1

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (*_ASK, *_IGNORED):
            self._before[number] = signal.signal(number, _noticed)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        with self._guard:
            os.close(self._reader)
            os.close(self._writer)
            self._reader = self._writer = -1

    def wait(self, seconds: float | None) -> signal.Signals | None:
        """The signal that asked for the end; None after *seconds*, or when `wake` was called."""
        ready, _, _ = select.select([self._reader], [], [], seconds)
        if not ready:
            return None
        numbers = os.read(self._reader, 4096)
        found = [number for number in _ASK if number in numbers]
        return found[0] if found else None

    def wake(self) -> None:
        """End a `wait`; from any thread, and nothing once the context has ended.

        The number of a pipe that is closed may be that of a file by then: a byte too much was seen
        in one of the graph's records.
        """
        with self._guard:
            if self._writer >= 0:
                os.write(self._writer, _WAKE)


def ignore_hangup() -> None:
    """Let SIGHUP do nothing, from the first moment on."""
    for number in _IGNORED:
        signal.signal(number, _noticed)


def _noticed(_number: int, _frame: FrameType | None) -> None:
    """What Python calls after it has written the signal's number to the pipe."""
