"""Waiting for what happens by itself: as long as a busy machine may take, and no longer."""

import time
from collections.abc import Callable
from typing import Final

PATIENCE: Final = 60.0  # seconds until something counts as hung, on machines that others load
_PAUSE: Final = 0.02


def wait_for(
    condition: Callable[[], object],
    what: str | Callable[[], str] = "it does not happen",
    seconds: float = PATIENCE,
) -> None:
    """Return as soon as *condition* holds; `AssertionError` with *what* after *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(what if isinstance(what, str) else what())
        time.sleep(_PAUSE)
