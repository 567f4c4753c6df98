"""A pool of the embedded engine on plain files, in this process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devmapper.engine.embedded.device import ThinDevice
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.port import PoolTable
from devmapper.thin.blocks import FileDevice
from tests.support.pools import (
    ONE,
    SIZE,
    FaultyDataFile,
    FaultyMetadataDevice,
    Rig,
    assert_clean,
    make_table,
)


@pytest.fixture
def table(tmp_path: Path) -> PoolTable:
    return make_table(tmp_path)


@pytest.fixture
def pool(table: PoolTable) -> Iterator[EmbeddedPool]:
    with EmbeddedPool.open(table) as pool:
        yield pool
    assert_clean(table)


@pytest.fixture
def device(pool: EmbeddedPool) -> ThinDevice:
    pool.create_thin(ONE)
    return pool.open_device(ONE, SIZE)


@pytest.fixture
def rig(table: PoolTable) -> Iterator[Rig]:
    """A pool on devices that can be made to fail."""
    data = FaultyDataFile(os.open(table.data_device, os.O_RDWR | os.O_CLOEXEC), table.data_device)
    device = FaultyMetadataDevice(FileDevice.open(table.metadata_device))
    rig = Rig(table, data, device, commit_period=3600)
    yield rig
    rig.close()
