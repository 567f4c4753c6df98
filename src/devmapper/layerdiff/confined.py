"""Finding directories below a root for names that strangers chose.

Symbolic links are resolved as if the root were "/", so none leads out of it.  The kernel does it
(openat2 with RESOLVE_IN_ROOT); where it cannot, a walk by hand gives the same answers.
"""

import os
import stat
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import ELOOP, ENOTDIR
from pathlib import Path
from typing import Final, Self

from devmapper.linux.openat2 import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

_PLACE: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_RESOLVE: Final = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
_MAX_LINKS: Final = 40  # MAXSYMLINKS
_PATH_MAX: Final = 4096
_CACHED: Final = 64


class ConfinedRoot:
    """A root directory; a context manager.

    Descriptors of directories that were found are kept for a while: call `forget` after any
    directory or symbolic link was removed.
    """

    def __init__(
        self, root: Path, *, by_kernel: bool = True, owner: tuple[int, int] | None = None
    ) -> None:
        """*owner*: who gets the directories that are made; else they stay whose they are."""
        self._owner = owner
        self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._cache: OrderedDict[tuple[str, ...], int] = OrderedDict()
        self._by_kernel = by_kernel and self._kernel_can()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.forget()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def forget(self) -> None:
        while self._cache:
            os.close(self._cache.popitem()[1])

    def directory(self, parts: Sequence[str], *, create: bool = False) -> int:
        """A descriptor (O_PATH) of the directory *parts*, valid until the next call or `forget`.

        With *create*, parents that are missing are made with mode 0755.  Raises `OSError`:
        ENOENT, ENOTDIR, ELOOP, or EEXIST for a symbolic link that leads nowhere.
        """
        key = tuple(parts)
        if not key:
            return self.fd
        fd = self._cache.get(key)
        if fd is not None:
            self._cache.move_to_end(key)
            return fd
        try:
            above = self._cache.get(key[:-1])
            fd = self._resolve(key) if above is None else self._below(above, key)
        except FileNotFoundError:
            if not create:
                raise
            fd = self._create(key)
        if len(self._cache) >= _CACHED:
            os.close(self._cache.popitem(last=False)[1])
        self._cache[key] = fd
        return fd

    def _create(self, parts: tuple[str, ...]) -> int:
        with _held(os.dup(self.fd)) as held:
            for count in range(1, len(parts) + 1):
                try:
                    held.replace(self._below(held.fd, parts[:count]))
                except FileNotFoundError:
                    name = parts[count - 1]
                    os.mkdir(name, 0o700, dir_fd=held.fd)
                    fd = os.open(name, _PLACE | os.O_NOFOLLOW, dir_fd=held.fd)
                    held.replace(fd)
                    if self._owner is not None:
                        os.chown(f"/proc/self/fd/{fd}", *self._owner)
                    os.chmod(f"/proc/self/fd/{fd}", 0o755)  # noqa: PTH101, S103 - whatever the umask
            return held.take()

    def _below(self, above: int, parts: tuple[str, ...]) -> int:
        """Resolve *parts* where *above* is the directory of its last: one step, if no link."""
        try:
            return os.open(parts[-1], _PLACE | os.O_NOFOLLOW, dir_fd=above)
        except NotADirectoryError:  # a symbolic link too
            return self._resolve(parts)

    def _kernel_can(self) -> bool:
        """ENOSYS before Linux 5.6; EPERM from seccomp filters that do not know the call."""
        with suppress(OSError):
            os.close(openat2(self.fd, ".", _PLACE, resolve=_RESOLVE))
            return True
        return False

    def _resolve(self, parts: tuple[str, ...]) -> int:
        if self._by_kernel:
            path = "/".join(parts)
            if len(os.fsencode(path)) < _PATH_MAX:
                return openat2(self.fd, path, _PLACE, resolve=_RESOLVE)
        return self._walk(parts)

    def _walk(self, parts: tuple[str, ...]) -> int:
        """Component by component.  `..` starts again from the root, so it cannot be moved away."""
        pending = deque(parts)
        done: list[str] = []
        links = 0
        with _held(os.dup(self.fd)) as held:
            while pending:
                name = pending.popleft()
                if name in ("", "."):
                    continue
                if name == "..":
                    held.replace(self._reopen(done[:-1]))
                    del done[-1:]
                    continue
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held.fd)
                mode = os.fstat(fd).st_mode
                if stat.S_ISDIR(mode):
                    held.replace(fd)
                    done.append(name)
                    continue
                os.close(fd)
                links += 1
                if not stat.S_ISLNK(mode):
                    raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR), name)
                if links > _MAX_LINKS:
                    raise OSError(ELOOP, os.strerror(ELOOP), name)
                target = os.readlink(name, dir_fd=held.fd)
                pending.extendleft(reversed(target.split("/")))
                if target.startswith("/"):
                    held.replace(os.dup(self.fd))
                    done.clear()
            return held.take()

    def _reopen(self, parts: Sequence[str]) -> int:
        with _held(os.dup(self.fd)) as held:
            for name in parts:
                held.replace(os.open(name, _PLACE | os.O_NOFOLLOW, dir_fd=held.fd))
            return held.take()


class _Held:
    """One descriptor that is closed unless it is taken."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def replace(self, fd: int) -> None:
        os.close(self.fd)
        self.fd = fd

    def take(self) -> int:
        fd, self.fd = self.fd, -1
        return fd


@contextmanager
def _held(fd: int) -> Iterator[_Held]:
    held = _Held(fd)
    try:
        yield held
    finally:
        if held.fd >= 0:
            os.close(held.fd)
