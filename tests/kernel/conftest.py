"""What the tests share that need the kernel's device mapper."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.engine.kernel.engine import KernelEngine
from devmapper.engine.kernel.pool import KernelPool
from devmapper.engine.port import PoolTable
from devmapper.linux import loop
from tests.support import capabilities, dm, thin_tools
from tests.uml.boot import SCRATCH

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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk: thin_check reads with O_DIRECT, which the guest's tmpfs does not have."""
    if not SCRATCH.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=SCRATCH))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def udevd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """udevd runs, and the programs that the test starts work with it."""
    with dm.udevd():
        monkeypatch.delenv("DM_DISABLE_UDEV", raising=False)
        yield
