"""What the tests of the kernel engine share: every one of them needs device mapper."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.engine.kernel.engine import KernelEngine
from devmapper.engine.kernel.pool import KernelPool
from devmapper.engine.port import PoolTable
from devmapper.linux import loop
from tests.support import capabilities, dm, thin_tools

POOL = "kernel-test-pool"


@pytest.fixture
def engine() -> KernelEngine:
    return KernelEngine()


@pytest.fixture
def table(tmp_path: Path) -> PoolTable:
    """A pool on two files."""
    return dm.make_table(tmp_path)


@pytest.fixture
def pool(engine: KernelEngine, table: PoolTable) -> Iterator[KernelPool]:
    """An active pool; afterwards nothing of it is left and thin_check has the last word."""
    yield engine.activate_pool(POOL, table)
    put_away(engine, table)


def put_away(engine: KernelEngine, table: PoolTable) -> None:
    dm.settle()
    engine.deactivate_pool(POOL)
    assert engine.find_pool(POOL) is None
    dm.await_no_loops_on(table.metadata_device, table.data_device)
    check(table)


def check(table: PoolTable) -> None:
    """thin_check has nothing to say; it wants direct I/O, which a tmpfs does not have."""
    if capabilities.tools():
        return
    with loop.attached(table.metadata_device, direct_io=False, read_only=True) as node:
        checked = thin_tools.thin_check(node)
    assert checked, checked.output
