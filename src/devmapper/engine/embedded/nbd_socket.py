"""The unix socket of an NBD export, as the clients of the engine process make and remove it.

The engine process gets it bound and listening: it must touch no file system that could stand on one
of its own devices, and the name is the user's choice.
"""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from devmapper.engine.embedded import runtime
from devmapper.errors import EnvironmentLacking, UsageError
from devmapper.units import ThinId

_PATH_MAX: Final = 107  # bytes of sun_path, without the zero at its end
_BACKLOG: Final = 16


def default_path(paths: runtime.Paths, thin_id: ThinId) -> Path:
    """Where a device is served when nobody chose; short, for names of devices are long."""
    return paths.directory / f"nbd-{thin_id}.sock"


def check_path(path: Path) -> Path:
    """The absolute path of a socket, as clients have to name it; `UsageError` if none can."""
    whole = path.absolute()
    if "\0" in str(whole) or whole.name in ("", ".."):
        raise UsageError(f"{str(path)!r} cannot be the name of a socket")
    if len(os.fsencode(whole)) > _PATH_MAX:
        raise UsageError(
            f"socket {str(whole)!r} is longer than {_PATH_MAX} bytes",
            hint="choose a shorter one with --socket",
        )
    return whole


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket of mode 0600 that listens at *path*; closed afterwards, removed after an error.

    One that nobody listens on any more is replaced.  `UsageError` if something else has the name.
    """
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # The mode that the name gets with bind (unix(7)): there is no moment with another one
        os.fchmod(listener.fileno(), 0o600)
        try:
            listener.bind(os.fspath(path))
        except OSError as err:
            if err.errno == errno.EADDRINUSE:
                raise _taken(path) from err
            raise EnvironmentLacking(
                f"cannot make the socket {str(path)!r}: {err.strerror}",
                hint="choose another one with --socket",
            ) from err
        try:
            listener.listen(_BACKLOG)
            yield listener
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def remove(path: Path) -> None:
    """Remove the socket of an export that has ended, unless somebody else has made it his own."""
    with suppress(OSError, UsageError):
        _remove_stale(path)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{str(path)!r} exists, and it is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.0)  # one whose backlog is full is not waited for
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as err:
            if err.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    raise _taken(path)


def _taken(path: Path) -> UsageError:
    return UsageError(
        f"somebody listens on the socket {str(path)!r}", hint="choose another one with --socket"
    )
