"""A consistent copy of an active pool's metadata."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from devmapper.engine.kernel import metadata_device
from devmapper.engine.kernel.locks import PoolLocks
from devmapper.engine.port import PoolTable
from devmapper.errors import EngineError
from devmapper.thin.format import BLOCK_SIZE, ZERO_BLOCK

if TYPE_CHECKING:
    from devmapper.engine.kernel.pool import KernelPool


def export(pool: "KernelPool", locks: PoolLocks, table: PoolTable, target: Path) -> None:
    pool.commit()
    with metadata_device.opened(table.metadata_device) as device:
        for _ in range(5):
            before = device.read(0)
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, device.nr_blocks * BLOCK_SIZE)
                for block in range(device.nr_blocks):
                    data = device.read(block)
                    if data != ZERO_BLOCK:
                        os.pwrite(fd, data, block * BLOCK_SIZE)
                os.fsync(fd)
            finally:
                os.close(fd)
            if device.read(0) == before:
                return
    raise EngineError("metadata changed all the time")
