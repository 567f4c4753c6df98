"""The command with a thread that can be killed: `python -m tests.support.mortal THREAD WORD ...`.

SIGUSR1 raises an exception in the thread of that name, wherever it is; one that waits in a system
call dies when it comes back.
"""

import ctypes
import signal
import sys
import threading
from types import FrameType


def _kill(name: str) -> None:
    (thread,) = [each for each in threading.enumerate() if each.name == name]
    assert thread.ident is not None
    # asyncio catches every other exception at its handles
    found = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
    )
    assert found == 1


def main() -> None:
    name = sys.argv.pop(1)

    def noticed(_number: int, _frame: FrameType | None) -> None:
        _kill(name)

    signal.signal(signal.SIGUSR1, noticed)
    from devmapper.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
