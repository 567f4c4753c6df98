"""Telling the service manager how the daemon is: sd_notify(3), its protocol without its library."""

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final, Self

log = logging.getLogger(__name__)

_SOCKET: Final = "NOTIFY_SOCKET"
_WATCHDOG_TIME: Final = "WATCHDOG_USEC"
_WATCHDOG_PROCESS: Final = "WATCHDOG_PID"


class Notifier:
    """Sends states to the manager that started us; silent if none did."""

    @classmethod
    def take(cls) -> Self:
        """The one of this process's environment, which programs that we start do not get.

        The engine's process is one of them, and outlives us.
        """
        notifier = cls(os.environ)
        for name in (_SOCKET, _WATCHDOG_TIME, _WATCHDOG_PROCESS):
            os.environ.pop(name, None)
        return notifier

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get(_SOCKET, "")
        if address.startswith("@"):  # in the abstract namespace, unix(7)
            address = "\0" + address[1:]
        self._address = address if address[:1] in ("\0", "/") else ""
        self.watchdog_seconds = _watchdog_seconds(environment)

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}", f"MAINPID={os.getpid()}")

    def status(self, status: str) -> None:
        """One line that `systemctl status` shows."""
        self._send(f"STATUS={status}")

    def stopping(self, status: str, seconds: float) -> None:
        """It ends, and may take *seconds* from now on, also where the unit allows less."""
        microseconds = round(seconds * 1e6)
        self._send("STOPPING=1", f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={microseconds}")

    def alive(self) -> None:
        """What the watchdog waits for, at least every `watchdog_seconds`."""
        self._send("WATCHDOG=1")

    def _send(self, *assignments: str) -> None:
        if not self._address:
            return
        message = "\n".join(each.replace("\n", " ") for each in assignments)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.sendto(message.encode(errors="replace"), self._address)
        except OSError as err:
            log.warning("the service manager was not told %s: %s", assignments[0], err.strerror)


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """How long the manager waits for a sign of life; None if it does not, or not of us."""
    time = environment.get(_WATCHDOG_TIME, "")
    process = environment.get(_WATCHDOG_PROCESS, "")
    if not (time.isascii() and time.isdigit()) or int(time) == 0:
        return None
    if process and process != str(os.getpid()):
        return None
    return int(time) / 1e6
