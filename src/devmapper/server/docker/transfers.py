"""Which layers a tar is being unpacked into, remembered in case the daemon does not live to end it.

When a connection is lost amid ApplyDiff, Docker's client sends the request again with what it has
not yet read of the tar (moby `pkg/plugins/client.go` callWithRetry): the end of a tar, or nothing
at all, which for itself is an empty tar, and Docker would take half of a layer for the whole.  So a
layer that a transfer was broken off into takes no other one.  What remembers it is a file that a
boot removes, and a boot ends every Docker as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from devmapper.errors import LayerError


class Transfers:
    """Transfers into the layers of one graph.  Methods may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        """*directory* is one of a file system that is empty after a boot; made when needed."""
        self._directory = directory

    @contextmanager
    def into(self, layer: str) -> Iterator[None]:
        """One transfer; `LayerError` where another one is under way or was broken off."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            os.close(os.open(self._directory / layer, flags, 0o600))
        except FileExistsError:
            raise LayerError(
                layer,
                f"layer {layer!r} holds a part of another transfer",
                hint="remove the layer and make it again",
            ) from None
        yield
        self.forget(layer)

    def forget(self, layer: str) -> None:
        """The layer is complete, or gone."""
        with suppress(FileNotFoundError):
            (self._directory / layer).unlink()
