"""Unix sockets of the daemon: mode 0600 before anybody can connect, no file left behind.

A socket is bound under another name in a directory that only we can enter and gets its own name
when it listens: there is no moment at which it has too many rights or refuses connections, and a
client of the daemon that ran before finds either the old socket or the new one.
"""

import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from devmapper.errors import UsageError

_PATH_LIMIT: Final = 107  # sun_path less the NUL, unix(7)
BACKLOG: Final = 1024
_MODE: Final = 0o600
_PROBE_SECONDS: Final = 1.0


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A place for a socket that becomes *path*, with mode 0600, when the context ends well.

    Whoever uses it binds and listens at the place that is yielded.  A file at *path* that is the
    socket of a process that has ended is replaced.  `UsageError` for a path that no socket can
    have, `OSError`: EADDRINUSE where somebody listens, EEXIST where something else stands there.
    """
    check_path(path)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_free(path)
    # Short names: the place has to fit into sun_path, too
    directory = Path(tempfile.mkdtemp(prefix=".s", dir=path.parent))
    place = directory / "s"
    try:
        yield place
        place.chmod(_MODE)
        place.rename(path)
    finally:
        with suppress(FileNotFoundError):
            place.unlink()
        directory.rmdir()


def listen(path: Path) -> socket.socket:
    """A socket that listens at *path*; errors as `publishing`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with publishing(path) as place:
            listener.bind(str(place))
            listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the socket at *path*, to tell it from one that replaces it later."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def remove(path: Path, own: tuple[int, int] | None) -> None:
    """Remove the file of a socket of ours, unless another daemon has replaced it by its own."""
    if own is not None and identity(path) == own:
        with suppress(FileNotFoundError):
            path.unlink()


def check_path(path: Path) -> None:
    """`UsageError` for a path that is not absolute or too long for a socket."""
    if not path.is_absolute():
        raise UsageError(f"socket {str(path)!r} is not an absolute path")
    if len(os.fsencode(path)) > _PATH_LIMIT - len("/.s12345678/s"):
        raise UsageError(
            f"socket {str(path)!r} has a path of more than {_PATH_LIMIT - 13} bytes",
            hint="a unix socket cannot have more: choose a shorter one",
        )


def check_free(path: Path) -> None:
    """`OSError` if somebody listens at *path*, or something else than a socket stands there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, "there is something that is not a socket", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return  # its process has ended
    raise OSError(errno.EADDRINUSE, "another process listens there", str(path))
