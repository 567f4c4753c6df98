"""How many users the mount of each layer has, and who they are.

A user with a name (a front end: `docker`) is remembered until the next boot, as mounts are, so that
a daemon that was killed or upgraded goes on counting where it was.  One without a name is this
process's alone.  The numbers count only while the layer is mounted: that is asked of the system.
"""

import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.deviceset.names import LayerId, file_name, layer_of_file

SOMEBODY: Final = ""  # who has no name: a user in this process, or whoever mounted it before
_MODE: Final = 0o600
_TEMPORARY: Final = ".tmp-"


class Users:
    """The users of one graph's mounts.

    A layer's methods are called while holding that layer, from other processes as well.
    """

    def __init__(self, directory: Path) -> None:
        """*directory* is one of a file system that is empty after a boot; made when needed."""
        self._directory = directory
        self._nameless: dict[LayerId, int] = {}

    def of(self, layer: LayerId) -> Counter[str]:
        """Who uses a layer that is mounted: somebody, if that is not known any better.

        Those with a name are read anew: another process on the graph may have counted.
        """
        found = self._read(layer)
        found.update({SOMEBODY: self._nameless.get(layer, 0)})
        return +found if found.total() else Counter({SOMEBODY: 1})

    def set(self, layer: LayerId, users: Counter[str]) -> None:
        """Remember them; `OSError` where that fails for those with a name."""
        named = {name: number for name, number in users.items() if name and number}
        if named != self._read(layer):
            self._write(layer, named)
        self._nameless[layer] = users[SOMEBODY]

    def drop(self, layer: LayerId) -> None:
        """The layer is not mounted any more."""
        self._nameless.pop(layer, None)
        with suppress(FileNotFoundError):
            self._file(layer).unlink()

    def forget(self) -> None:
        """Nobody in this process uses a mount any more."""
        self._nameless.clear()

    def tidy(self) -> None:
        """Remove what processes have left that were killed while they wrote."""
        for name in self._names():
            if not name.startswith(_TEMPORARY):
                continue
            pid = name.removeprefix(_TEMPORARY).partition("-")[0]
            if not Path("/proc", pid).exists():
                with suppress(FileNotFoundError):
                    (self._directory / name).unlink()

    def layers(self) -> list[LayerId]:
        """The layers that somebody with a name is remembered for; not all may be mounted."""
        return [layer_of_file(name) for name in self._names() if not name.startswith(_TEMPORARY)]

    def layers_of(self, user: str) -> list[LayerId]:
        """Those that *user*, who has a name, is remembered for."""
        return [layer for layer in self.layers() if self._read(layer).get(user)]

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._directory))
        except FileNotFoundError:
            return []

    def _file(self, layer: LayerId) -> Path:
        return self._directory / file_name(layer)

    def _read(self, layer: LayerId) -> Counter[str]:
        try:
            members = json.loads(self._file(layer).read_bytes())
        except (FileNotFoundError, ValueError):  # ValueError: a full disk while it was written
            return Counter()
        if not isinstance(members, dict):
            return Counter()
        return Counter(
            {name: n for name, n in members.items() if name and isinstance(n, int) and n > 0}
        )

    def _write(self, layer: LayerId, users: dict[str, int]) -> None:
        file = self._file(layer)
        if not users:
            with suppress(FileNotFoundError):
                file.unlink()
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = file.parent / f"{_TEMPORARY}{os.getpid()}-{layer}"[:255]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(temporary, flags, _MODE), "wb") as out:
            out.write(json.dumps(users).encode())
        temporary.replace(file)


def take_back(users: Counter[str], user: str) -> bool:
    """Let *user* leave once; False if only others use the layer.

    Whoever mounted it without a name leaves for anybody.
    """
    for name in (user, SOMEBODY):
        if users[name] > 0:
            users[name] -= 1
            return True
    return False
