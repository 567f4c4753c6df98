"""The readers on metadata that the writing half made: sharing, snapshots, a metadata snap."""

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest

from devmapper.thin.blocks import FileDevice
from devmapper.thin.check import check
from devmapper.thin.dump import dump
from devmapper.thin.ls import ls
from devmapper.thin.metadata import PoolMetadata
from devmapper.units import Bytes, ThinId
from tests.format.test_readers import assert_delta_equals, assert_equal_to_tools, untouched
from tests.support.thin_tools import thin_dump

pytestmark = pytest.mark.tools

NR_METADATA = 2048
NR_DATA = 40_000


class Workload:
    """Creates, snapshots, writes, discards and deletes at random, as layers do."""

    def __init__(self, metadata: PoolMetadata, seed: int) -> None:
        self.metadata = metadata
        self.chance = random.Random(seed)
        self.following = 0

    def create(self) -> None:
        self.following += 1
        existing = self.metadata.thin_ids()
        if existing and self.chance.random() < 0.8:
            self.metadata.create_snap(ThinId(self.following), self.chance.choice(existing))
        else:
            self.metadata.create_thin(ThinId(self.following))

    def write(self, thin_id: ThinId) -> None:
        begin = self.chance.choice((0, 1000, 5000)) + self.chance.randrange(900)
        blocks = range(begin, begin + self.chance.choice((1, 5, 300)), self.chance.choice((1, 2)))
        for block in blocks:
            self.metadata.remove(thin_id, block)
        data = self.metadata.allocate_data_blocks(len(blocks))
        self.metadata.insert_many(thin_id, list(zip(blocks, data, strict=True)))

    def step(self) -> None:
        thin_ids = self.metadata.thin_ids()
        what = self.chance.random()
        if what < 0.3 or not thin_ids:
            self.create()
        elif what < 0.8:
            self.write(self.chance.choice(thin_ids))
        elif what < 0.9:
            begin = self.chance.randrange(6000)
            self.metadata.remove_range(self.chance.choice(thin_ids), begin, begin + 400)
        elif what < 0.95:
            self.metadata.delete(self.chance.choice(thin_ids))
        self.commit()

    def commit(self) -> None:
        self.metadata.release_data_blocks(self.metadata.commit())


@pytest.mark.parametrize("seed", range(3))
def test_what_we_write_reads_as_the_tools_read_it(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "metadata"
    path.touch()
    os.truncate(path, NR_METADATA * 4096)
    with PoolMetadata.format(
        FileDevice.open(path), data_block_size=Bytes(65536), nr_data_blocks=NR_DATA
    ) as metadata:
        work = Workload(metadata, seed)
        for _ in range(60):
            work.step()
            with untouched(path) as device:
                report = check(device)
            assert (report.damages, report.notes) == ([], [])
        assert_equal_to_tools(path)
        thin_ids = metadata.thin_ids()
        assert len(thin_ids) > 3
        with untouched(path) as device:
            mapped = [usage for usage in ls(device) if usage.mapped_blocks]
            for usage in mapped:
                assert usage.highest_mapped_block == metadata.highest_mapped_block(usage.thin_id)
            # thin_delta of 0.9 reads behind the end of an empty list of mappings.
            for left, right in pairwise(mapped[:6]):
                assert_delta_equals(device, path, left.thin_id, right.thin_id)

        metadata.release_data_blocks(metadata.reserve_metadata_snap())
        work.commit()
        held = thin_dump(path, "-m")
        for _ in range(20):
            work.step()
            with untouched(path) as device:
                assert check(device).damages == []
                assert check(device, metadata_snap=True).damages == []
                assert "".join(dump(device, metadata_snap=True)) == held
