"""Embedded pools on files, without root, and ways to make their devices fail."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from devmapper.engine.embedded.data_file import DataFile
from devmapper.engine.embedded.device import ThinDevice
from devmapper.engine.embedded.opening import PoolDevices
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.port import PoolTable
from devmapper.thin.blocks import MetadataDevice
from devmapper.thin.metadata import PoolMetadata, is_blank
from devmapper.units import KIB, MIB, Bytes, ThinId
from tests.support.thin_tools import have_thin_tools, thin_check

BLOCK: Final = 64 * KIB
ONE, TWO, THREE = ThinId(1), ThinId(2), ThinId(3)
SIZE = Bytes(4 * MIB)  # of a device


def make_table(folder: Path, *, blocks: int = 256, **features: Any) -> PoolTable:
    """A table on two new sparse files in *folder*; a pool of *blocks* data blocks."""
    block_size = features.pop("block_size", Bytes(BLOCK))
    metadata, data = folder / "metadata", folder / "data"
    for path, size in ((metadata, 4 * MIB), (data, blocks * block_size)):
        path.touch()
        os.truncate(path, size)
    return PoolTable(
        metadata,
        data,
        Bytes(blocks * block_size),
        block_size,
        low_water_mark=features.pop("low_water_mark", 0),
        **features,
    )


def assert_clean(table: PoolTable) -> None:
    """The oracle, where it is installed."""
    if have_thin_tools():
        checked = thin_check(table.metadata_device)
        assert checked, checked.output


def write(device: ThinDevice, offset: int, data: bytes) -> None:
    device.write(offset, memoryview(data))


def read(device: ThinDevice, offset: int, length: int) -> bytes:
    found = bytearray(b"\xa5" * length)  # what is not filled in would be seen
    device.read(offset, memoryview(found))
    return bytes(found)


@contextmanager
def raises_errno(code: int) -> Iterator[None]:
    """Demand an `OSError` with this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno says it
        yield
    assert caught.value.errno == code


def used(pool: EmbeddedPool) -> int:
    return pool.status().used_data_blocks


def fill(pool: EmbeddedPool, thin_id: ThinId) -> tuple[ThinDevice, int]:
    """Use every data block of the pool for a new thin device.

    Return it and the first offset behind, where there is room for more.
    """
    pool.create_thin(thin_id)
    total = pool.status().total_data_blocks
    device = pool.open_device(thin_id, Bytes((total + 8) * BLOCK))
    write(device, 0, b"f" * (total * BLOCK))
    return device, total * BLOCK


def stop_at(reached: threading.Event, go_on: threading.Event) -> Callable[[int], None]:
    """A hook for `before_write` that says where it is and waits."""

    def hook(_offset: int) -> None:
        reached.set()
        assert go_on.wait(60)

    return hook


class FaultyDataFile(DataFile):
    """Fails where it is told to; the bytes below are real."""

    write_error: int = 0
    sync_error: int = 0
    syncs = 0
    before_write: Callable[[int], None] | None = None

    def write(self, view: memoryview, offset: int) -> None:
        if self.before_write is not None:
            self.before_write(offset)
        if self.write_error:
            raise OSError(self.write_error, os.strerror(self.write_error), str(self.path))
        super().write(view, offset)

    def sync(self) -> None:
        if self.unsynced:
            self.syncs += 1
            if self.sync_error:
                raise OSError(self.sync_error, os.strerror(self.sync_error), str(self.path))
        super().sync()


class FaultyMetadataDevice:
    """A metadata device whose writes fail while `broken` is set; all but the superblock's
    if `spares_superblock`."""

    def __init__(self, device: MetadataDevice) -> None:
        self._device = device
        self.broken = False
        self.spares_superblock = True
        self.unreadable = False
        self.flushes = 0

    @property
    def nr_blocks(self) -> int:
        return self._device.nr_blocks

    def read(self, block: int) -> bytes:
        if self.unreadable:
            raise OSError(errno.EIO, "simulated read error")
        return self._device.read(block)

    def write(self, block: int, data: bytes) -> None:
        if self.broken and not (block == 0 and self.spares_superblock):
            raise OSError(errno.EIO, "simulated write error")
        self._device.write(block, data)

    def flush(self) -> None:
        self.flushes += 1
        self._device.flush()

    def close(self) -> None:
        self._device.close()


class Rig:
    """A pool on a data file and a metadata device that the test brings; closed by `close`."""

    def __init__(
        self, table: PoolTable, data: DataFile, device: MetadataDevice, **options: Any
    ) -> None:
        self.table = table
        self.data = data
        self.device = device
        if is_blank(device):
            metadata = PoolMetadata.format(
                device,
                data_block_size=table.block_size,
                nr_data_blocks=table.data_size // table.block_size,
            )
        else:
            metadata = PoolMetadata.open(device, data_block_size=table.block_size)
        self.pool = EmbeddedPool(table, PoolDevices(device, metadata, data), **options)

    def close(self) -> None:
        try:
            self.pool.close()
        finally:
            self.device.close()
            self.data.close()


class Background:
    """A call in a thread of its own; `result` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def is_running(self, *, after: float = 0.1) -> bool:
        """Whether it still runs when it has had *after* seconds."""
        self._thread.join(after)
        return self._thread.is_alive()

    def result(self, timeout: float = 60) -> None:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "still running"
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as err:
            self._error = err
