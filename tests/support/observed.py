"""A graph to look at whose pool can be brought into every mode, without root or FUSE.

Its layers are those of `LocalEngine`; its pool's status is that of a real embedded pool, which a
test fills or lets fail.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devmapper.driver import Driver
from devmapper.engine.port import PoolStatus, PoolTable
from tests.support.graphs import open_small
from tests.support.local_engine import LocalEngine, LocalPool


class Observed:
    """A driver, and whose answers its pool has."""

    def __init__(self, driver: Driver, pool: LocalPool) -> None:
        self.driver = driver
        self.pool = pool

    def follow(self, status: Any, table: PoolTable | None = None) -> None:
        """Let *status* answer for the pool from now on, and *table* too if it is given."""
        changed: dict[str, Any] = {"status": status}
        if table is not None:
            changed["table"] = lambda: table
        vars(self.pool).update(changed)

    def fails_with(self, error: Exception) -> None:
        def status() -> PoolStatus:
            raise error

        self.follow(status)


@contextmanager
def observed(home: Path, *layers: str, **owned: str) -> Iterator[Observed]:
    """A graph with *layers*, and with those whose owners are in *owned*."""
    engine = LocalEngine(deferred_removal=True)
    driver = Driver(open_small(home, engine))
    try:
        for layer in layers:
            driver.create(layer)
        for layer, owner in owned.items():
            driver.devices.add_device(layer, "", owner=owner)
        (pool,) = engine.pools.values()
        yield Observed(driver, pool)
    finally:
        driver.close()
        engine.crash()
