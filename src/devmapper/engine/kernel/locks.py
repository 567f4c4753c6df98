"""Locks of one pool among processes: who changes a device, who holds it suspended, who reads.

All of them are bytes of the file beside the pool's runtime directory, which is never removed.  The
kernel lets go of a lock when its holder dies, so a free lock beside a suspended device is the proof
that whoever suspended it is dead.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from devmapper.engine import runtime
from devmapper.engine.runtime import DeviceLocked, device_lock, make_private
from devmapper.errors import UsageError
from devmapper.linux import dmnode

_METADATA: Final = 2 << 32
_LOCK_SECONDS: Final = 180.0


def check_plain(name: str, what: str) -> str:
    """As `runtime.check_name`, and without what udev and dmsetup would replace by escapes."""
    if not dmnode.is_plain(runtime.check_name(name, what)):
        raise UsageError(
            f"{what} name {name!r} has other characters than A-Z a-z 0-9 # + - . : = @ _"
        )
    return name


class PoolLocks:
    """The locks of one pool."""

    def __init__(self, pool: str) -> None:
        self.directory = runtime.directory_of(pool)
        self._file = runtime.start_lock_of(self.directory)

    @contextmanager
    def start(self) -> Iterator[None]:
        """Held by whoever activates or deactivates the pool."""
        with runtime.start_lock(self.directory, _LOCK_SECONDS):
            yield

    @contextmanager
    def change(self, name: str) -> Iterator[None]:
        """Held while the device *name* is activated, deactivated or being suspended."""
        with self._held(name, 0, _LOCK_SECONDS):
            yield

    @contextmanager
    def suspension(self, name: str) -> Iterator[None]:
        """Held as long as the device *name* is suspended."""
        with self._held(name, runtime.SUSPENSION, _LOCK_SECONDS):
            yield

    @contextmanager
    def abandoned(self, name: str) -> Iterator[bool]:
        """Whether nobody holds *name* suspended; then the lock is ours for the duration."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._held(name, runtime.SUSPENSION, 0.0))
            except DeviceLocked:
                yield False
            else:
                yield True

    @contextmanager
    def metadata(self) -> Iterator[None]:
        """Held by whoever has the pool's metadata snap."""
        with self._held("", _METADATA, _LOCK_SECONDS):
            yield

    @contextmanager
    def _held(self, name: str, part: int, timeout: float) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(device_lock(self._file, name, part=part, timeout=timeout))
            except FileNotFoundError:  # no base yet: the first use since the machine started
                make_private(self._file.parent)
                stack.enter_context(device_lock(self._file, name, part=part, timeout=timeout))
            yield
