"""What the kernel says in its log while something is tried (/dev/kmsg, kernel.org ABI dev-kmsg).

A help for people and nothing else: where the log cannot be read, nothing was said.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_RECORD: Final = 8192  # CONSOLE_EXT_LOG_MAX
_MAX_RECORDS: Final = 1000
_MAX_TEXT: Final = 256  # what Docker adds to its error


class KernelLog:
    """The log from the moment on at which it was opened."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def about(self, name: str, *sources: str) -> str:
        """What was said of the device *name* (such as `dm-3`), at most its last 256 characters.

        Also what the *sources* said without naming any device, such as `ext4` of an option that it
        does not know.
        """
        own = tuple(f"{source}{end}" for source in sources for end in (": ", "-fs: "))
        said = [
            text for text in self._messages() if _names(text, name) or text.lower().startswith(own)
        ]
        return "; ".join(said)[-_MAX_TEXT:]

    def _messages(self) -> Iterator[str]:
        for _ in range(_MAX_RECORDS if self._fd is not None else 0):
            record = self._next()
            if record is None:
                return
            # prefix;text, and then lines that begin with a blank: a dictionary
            _, _, text = record.partition(b";")
            yield text.split(b"\n")[0].decode(errors="replace").strip()

    def _next(self) -> bytes | None:
        while self._fd is not None:
            try:
                return os.read(self._fd, _RECORD)
            except OSError as err:
                if err.errno != errno.EPIPE:  # EPIPE: overwritten meanwhile, read on
                    return None
        return None


@contextmanager
def kernel_log() -> Iterator[KernelLog]:
    """Listen to the kernel's log for the duration; never fails and never waits."""
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield KernelLog(None)
        return
    try:
        try:
            os.lseek(fd, 0, os.SEEK_END)
        except OSError:
            yield KernelLog(None)
        else:
            yield KernelLog(fd)
    finally:
        os.close(fd)


def _names(text: str, name: str) -> bool:
    """Whether *name* stands in *text* as a word of its own: `loop1` is not in `loop12`."""
    begin = text.find(name)
    while begin >= 0:
        before, after = text[begin - 1 : begin], text[begin + len(name) :][:1]
        if not (before.isalnum() or after.isalnum()):
            return True
        begin = text.find(name, begin + 1)
    return False
