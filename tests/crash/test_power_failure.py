"""Power fails under the embedded engine: what a flush promised is there, nothing is mixed up."""

import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

from devmapper.engine.embedded.data_file import DataFile
from devmapper.units import Bytes, ThinId
from tests.support.audit import Audit
from tests.support.pools import BLOCK, Rig, make_table, read
from tests.support.power import (
    NOTHING,
    UNIT,
    LoggedDataFile,
    LoggedMetadata,
    PowerLog,
    memory_of,
    write_file,
)

if TYPE_CHECKING:
    from devmapper.engine.embedded.device import ThinDevice

NR_BLOCKS = 48
METADATA_BLOCKS = 512
SIZE = 12 * BLOCK
UNITS = SIZE // UNIT

# Of one unit: where in the log a value was begun to be written, and the value.
History = list[tuple[int, bytes]]


class Model:
    """What may be found after a crash, thin device by thin device."""

    def __init__(self, log: PowerLog) -> None:
        self.log = log
        self.units: dict[int, list[History]] = {}
        self.created: dict[int, int] = {}
        self.deleted: dict[int, int] = {}
        self.flushes: list[tuple[int, int]] = [(0, 0)]  # log when it began, when it returned

    def create(self, thin_id: int, origin: int | None = None) -> None:
        self.created[thin_id] = len(self.log)
        if origin is None:
            self.units[thin_id] = [[(0, NOTHING)] for _ in range(UNITS)]
        else:
            self.units[thin_id] = [[(0, history[-1][1])] for history in self.units[origin]]

    def change(self, thin_id: int, begin: int, values: Sequence[bytes]) -> None:
        for unit, value in enumerate(values, begin):
            self.units[thin_id][unit].append((len(self.log), value))

    def live(self) -> list[int]:
        return [thin_id for thin_id in self.units if thin_id not in self.deleted]

    def check(self, cut: int, thin_ids: Sequence[int], read_all: Callable[[int], bytes]) -> None:
        promised = max(begin for begin, end in self.flushes if end <= cut)
        for thin_id, created in self.created.items():
            deleted = self.deleted.get(thin_id, cut + 1)
            if deleted < promised:
                assert thin_id not in thin_ids, f"{thin_id} was deleted"
            elif created < promised and deleted > cut:
                assert thin_id in thin_ids, f"{thin_id} is lost"
        for thin_id in thin_ids:
            assert self.created[thin_id] <= cut
            found = read_all(thin_id)
            for unit, history in enumerate(self.units[thin_id]):
                value = found[unit * UNIT : (unit + 1) * UNIT]
                allowed = self.allowed(history, promised, cut)
                assert value in allowed, (
                    f"cut {cut}, thin id {thin_id}, unit {unit}: found {value[:20]!r},"
                    f" allowed {[v[:20] for v in allowed]}"
                )

    @staticmethod
    def allowed(history: History, promised: int, cut: int) -> list[bytes]:
        settled = [value for begin, value in history if begin < promised or begin == 0]
        later = [value for begin, value in history if promised <= begin <= cut]
        return [settled[-1], *later]


def workload(rig: Rig, model: Model, rng: random.Random, steps: int) -> None:
    pool = rig.pool
    devices: dict[int, ThinDevice] = {}

    def add(thin_id: int, origin: int | None = None) -> None:
        model.create(thin_id, origin)
        if origin is None:
            pool.create_thin(ThinId(thin_id))
        else:
            pool.create_snap(ThinId(thin_id), ThinId(origin))
        devices[thin_id] = pool.open_device(ThinId(thin_id), Bytes(SIZE))

    def change_range(kind: str) -> None:
        thin_id = rng.choice(model.live())
        length = rng.choice((1, 2, 16, 16, 20, 40))
        begin = rng.randrange(UNITS - length)
        if length == 16:
            begin = begin // 16 * 16
        stamps = [f"{thin_id}/{unit}/{step};".encode() for unit in range(length)]
        values = [(stamp * UNIT)[:UNIT] for stamp in stamps]
        if kind != "write":
            values = [NOTHING] * length
        model.change(thin_id, begin, values)
        if kind == "write":
            devices[thin_id].write(begin * UNIT, memoryview(b"".join(values)))
        elif kind == "discard":
            devices[thin_id].discard(begin * UNIT, length * UNIT)
        else:
            devices[thin_id].write_zeroes(begin * UNIT, length * UNIT)

    def delete() -> None:
        thin_id = rng.choice(model.live())
        devices.pop(thin_id).close()
        model.deleted[thin_id] = len(model.log)
        pool.delete(ThinId(thin_id))

    def flush() -> None:
        begin = len(model.log)
        devices[rng.choice(model.live())].flush()
        model.flushes.append((begin, len(model.log)))

    add(1)
    for step in range(2, steps):
        live = model.live()
        kind = rng.choice(("write",) * 6 + ("discard", "zero", "snap", "delete", "flush", "flush"))
        if kind == "snap" and len(live) < 3:
            add(step, rng.choice(live))
        elif kind == "delete" and len(live) > 1:
            delete()
        elif kind == "flush":
            flush()
        elif kind in ("write", "discard", "zero"):
            change_range(kind)


@pytest.fixture(params=[(1, True), (2, True), (3, False)], ids=lambda param: f"seed{param[0]}")
def story(request, tmp_path):
    """A run that was logged: its table, its log and what the model expects."""
    seed, skip_block_zeroing = request.param
    table = make_table(tmp_path, blocks=NR_BLOCKS, skip_block_zeroing=skip_block_zeroing)
    log = PowerLog()
    rig = Rig(
        table,
        LoggedDataFile.logging_to(table.data_device, log),
        LoggedMetadata(METADATA_BLOCKS, log),
        commit_period=3600,
    )
    formatted = len(log)
    model = Model(log)
    workload(rig, model, random.Random(seed), 150)
    rig.close()
    model.flushes.append((len(log), len(log)))
    return table, log, model, formatted


def test_after_any_power_failure(story, tmp_path):
    """At 150 moments; each time a random part of what was not flushed has arrived."""
    table, log, model, formatted = story
    rng = random.Random(5)
    cuts = sorted(rng.sample(range(formatted, len(log)), 147))
    for cut in (*cuts, len(log), len(log), formatted):
        metadata = memory_of(log.image("metadata", cut, rng), METADATA_BLOCKS)
        Audit(metadata)
        path = tmp_path / "crashed"
        write_file(path, log.image("data", cut, rng), table.data_size)
        rig = Rig(table._replace(data_device=path), DataFile.open(path), metadata)
        try:

            def read_all(thin_id, pool=rig.pool):
                with pool.open_device(ThinId(thin_id), Bytes(SIZE)) as device:
                    return read(device, 0, SIZE)

            model.check(cut, rig.pool.thin_ids(), read_all)
        finally:
            rig.close()


def test_no_block_is_punched_before_nothing_durable_refers_to_it(story):
    _, log, _, _ = story
    punched = 0
    for number, event in enumerate(log.events):
        is_punch = event.device == "data" and event.unit >= 0 and event.content is None
        if not is_punch or event.unit % (BLOCK // UNIT):
            continue
        durable = Audit(memory_of(log.image("metadata", number, None), METADATA_BLOCKS))
        in_use = {block for blocks in durable.contents.values() for block in blocks.values()}
        assert event.unit * UNIT // BLOCK not in in_use
        punched += 1
    assert punched > 10


def test_every_committed_mapping_has_durable_data(story):
    """At each write of a superblock, all data that went before it have been flushed."""
    _, log, _, _ = story
    superblocks = pending = 0
    for event in log.events:
        if event.device == "data":
            if event.covers >= 0:
                pending = 0
            elif event.content is not None:
                pending += 1
        elif event.unit == 0:
            superblocks += 1
            assert pending == 0
    assert superblocks > 10


def test_the_file_system_has_its_space_back_at_the_end(story):
    table, _, model, _ = story
    assert os.stat(table.data_device).st_blocks * 512 <= NR_BLOCKS * BLOCK
    assert model.deleted
