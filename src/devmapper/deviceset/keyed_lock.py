"""One lock for each of many keys, made when somebody wants it and dropped with its last user."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class _Entry:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class KeyedLock(Generic[K]):
    """Mutual exclusion by key between the threads of this process."""

    def __init__(self) -> None:
        self._entries: dict[K, _Entry] = {}
        self._guard = threading.Lock()

    @contextmanager
    def hold(self, *keys: K) -> Iterator[None]:
        """Hold the locks of all *keys*, which need not differ.

        They are taken in the order of their spelling, so that two callers that want the same keys
        never wait for each other.
        """
        with ExitStack() as stack:
            for key in sorted(set(keys), key=str):
                stack.enter_context(self._held(key))
            yield

    @contextmanager
    def _held(self, key: K) -> Iterator[None]:
        with self._guard:
            entry = self._entries.setdefault(key, _Entry())
            entry.users += 1
        try:
            with entry.lock:
                yield
        finally:
            with self._guard:
                entry.users -= 1
                if entry.users == 0:
                    del self._entries[key]
