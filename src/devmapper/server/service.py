"""What the daemon starts and stops: one protocol on one address."""

from typing import Final, Protocol

from devmapper.server.address import Address

STOP_SECONDS: Final = 30.0  # that requests under way are waited for when the daemon is told to end


class Service(Protocol):
    """An adapter: it translates one protocol and decides nothing."""

    @property
    def name(self) -> str:
        """One word for logs and metrics: docker, containerd, control, metrics."""

    @property
    def address(self) -> Address:
        """Where it listens; of port 0, which one that is, once it has started."""

    def start(self) -> None:
        """Listen; requests are answered when it returns.

        `UsageError` for an address that is not fit, `OSError` (EADDRINUSE where somebody else
        listens) where it cannot be had; nothing is left then.
        """

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Take no new requests and wait until those under way have ended, at most *seconds*.

        The socket's file is gone afterwards.  Idempotent, also before `start`; another thread may
        call it meanwhile with fewer seconds, which count from then on.
        """
