"""The embedded engine against a model: random operations, reopening, and crashes on copies.

A crash is a copy of both files at any moment, opened as if the process had died there: all writes
have arrived, commits since the copy have not.  `MODEL_STEPS` sets how long the runs are.
"""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from devmapper.engine.embedded.pool import EmbeddedPool, ThinDevice
from devmapper.engine.port import PoolMode, PoolTable
from devmapper.thin.blocks import FileDevice
from devmapper.units import KIB, Bytes, ThinId
from tests.support.audit import Audit
from tests.support.pools import BLOCK, make_table, read, write
from tests.support.thin_tools import have_thin_tools, thin_check

STEPS = int(os.environ.get("MODEL_STEPS", "300"))
NR_BLOCKS = 40  # few enough to run full
SIZE = 10 * BLOCK + 4096  # the last block is not whole
UNIT = 4 * KIB
UNITS = SIZE // UNIT

Contents = dict[int, bytearray]  # by thin id

offsets = st.integers(0, UNITS - 1)
lengths = st.one_of(st.integers(1, 4), st.sampled_from([16, 32, 48, 64]), st.integers(1, UNITS))
picks = st.integers(0, 1000)


class DataPath(RuleBasedStateMachine):
    """`now` is what the devices hold, `committed` what a crash leaves of devices and snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="data-path-"))
        self.table: PoolTable
        self.pool: EmbeddedPool
        self.devices: dict[int, ThinDevice] = {}
        self.now: Contents = {}
        self.committed: Contents = {}
        self.family: dict[int, set[int]] = {}  # a device and those that it was made of
        self.stamp = 0
        self.next_id = 1

    @initialize(skip_block_zeroing=st.booleans())
    def make(self, *, skip_block_zeroing: bool) -> None:
        self.table = make_table(
            self.folder,
            blocks=NR_BLOCKS,
            skip_block_zeroing=skip_block_zeroing,
            error_if_no_space=True,
        )
        self.open()
        self.create()

    def open(self) -> None:
        self.pool = EmbeddedPool.open(self.table, commit_period=3600)
        self.devices = {
            thin_id: self.pool.open_device(ThinId(thin_id), Bytes(SIZE)) for thin_id in self.now
        }

    def note_commit(self) -> None:
        self.committed = {thin_id: bytearray(data) for thin_id, data in self.now.items()}

    def pick(self, number: int) -> int:
        return sorted(self.now)[number % len(self.now)]

    @precondition(lambda self: len(self.now) < 6)
    @rule()
    def create(self) -> None:
        self.pool.create_thin(ThinId(self.next_id))
        self.add(bytearray(SIZE), set())

    @precondition(lambda self: 0 < len(self.now) < 6)
    @rule(number=picks)
    def snap(self, number: int) -> None:
        origin = self.pick(number)
        self.pool.create_snap(ThinId(self.next_id), ThinId(origin))
        self.add(bytearray(self.now[origin]), self.family[origin])

    def add(self, content: bytearray, family: set[int]) -> None:
        self.now[self.next_id] = content
        self.family[self.next_id] = family | {self.next_id}
        self.devices[self.next_id] = self.pool.open_device(ThinId(self.next_id), Bytes(SIZE))
        self.next_id += 1

    @precondition(lambda self: len(self.now) > 1)
    @rule(number=picks)
    def delete(self, number: int) -> None:
        thin_id = self.pick(number)
        self.devices.pop(thin_id).close()
        self.pool.delete(ThinId(thin_id))
        del self.now[thin_id]

    @rule(number=picks, begin=offsets, length=lengths, aligned=st.booleans())
    def write(self, number: int, begin: int, length: int, *, aligned: bool) -> None:
        thin_id = self.pick(number)
        begin = begin // 16 * 16 if aligned else begin
        self.stamp += 1
        stamps = [
            f"{thin_id}/{unit}/{self.stamp};".encode()
            for unit in range(begin, min(begin + length, UNITS))
        ]
        data = b"".join((stamp * UNIT)[:UNIT] for stamp in stamps)
        self.apply(thin_id, begin * UNIT, data, "write")

    @rule(number=picks, begin=offsets, length=lengths, aligned=st.booleans())
    def discard(self, number: int, begin: int, length: int, *, aligned: bool) -> None:
        begin = begin // 16 * 16 if aligned else begin
        zeros = bytes((min(begin + length, UNITS) - begin) * UNIT)
        self.apply(self.pick(number), begin * UNIT, zeros, "discard")

    @rule(number=picks, begin=offsets, length=lengths)
    def write_zeroes(self, number: int, begin: int, length: int) -> None:
        zeros = bytes((min(begin + length, UNITS) - begin) * UNIT)
        self.apply(self.pick(number), begin * UNIT, zeros, "write_zeroes")

    def apply(self, thin_id: int, offset: int, data: bytes, kind: str) -> None:
        """Change device and model; a full pool may have done any part of it."""
        device = self.devices[thin_id]
        try:
            if kind == "write":
                write(device, offset, data)
            else:
                getattr(device, kind)(offset, len(data))
        except OSError:
            assert self.pool.status().mode is PoolMode.OUT_OF_DATA_SPACE
            before = self.now[thin_id]
            found = read(device, 0, SIZE)
            assert found[:offset] == before[:offset]
            assert found[offset + len(data) :] == before[offset + len(data) :]
            for at in range(0, len(data), UNIT):
                old = before[offset + at : offset + at + UNIT]
                assert found[offset + at : offset + at + UNIT] in (old, data[at : at + UNIT])
            self.now[thin_id] = bytearray(found)
            return
        self.now[thin_id][offset : offset + len(data)] = data

    @rule(number=picks)
    def verify(self, number: int) -> None:
        thin_id = self.pick(number)
        assert read(self.devices[thin_id], 0, SIZE) == self.now[thin_id]

    @rule(number=picks)
    def flush(self, number: int) -> None:
        self.devices[self.pick(number)].flush()
        self.note_commit()

    @rule()
    def commit(self) -> None:
        self.pool.commit()
        self.note_commit()

    @rule()
    def reopen(self) -> None:
        self.pool.close()
        self.note_commit()
        self.check_clean(self.table)
        self.open()

    @rule()
    def crash(self) -> None:
        """What is found in a copy: devices of a commit, whose blocks hold old or newer data."""
        copy = Path(tempfile.mkdtemp(prefix="crashed-", dir=self.folder))
        table = self.table._replace(metadata_device=copy / "metadata", data_device=copy / "data")
        shutil.copy(self.table.metadata_device, table.metadata_device)
        shutil.copy(self.table.data_device, table.data_device)
        self.check_clean(table)
        with EmbeddedPool.open(table) as pool:
            # A full pool commits on its own, so the commit may be later than the model's
            for thin_id in self.committed.keys() & self.now.keys():
                with pool.open_device(ThinId(thin_id), Bytes(SIZE)) as device:
                    self.check_content(thin_id, read(device, 0, SIZE))
        shutil.rmtree(copy)

    def check_content(self, thin_id: int, found: bytes) -> None:
        """Unchanged since the commit is unchanged; the rest is this device's or zero."""
        committed, now = self.committed[thin_id], self.now[thin_id]
        for at in range(0, SIZE, UNIT):
            unit = found[at : at + UNIT]
            if committed[at : at + UNIT] == now[at : at + UNIT] == unit:
                continue
            if any(unit):
                owner, place = map(int, unit.split(b"/", 2)[:2])
                assert owner in self.family[thin_id], (thin_id, at, unit[:20])
                assert place * UNIT == at

    def check_clean(self, table: PoolTable) -> None:
        with FileDevice.open(table.metadata_device, read_only=True) as device:
            Audit(device)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            shutil.rmtree(self.folder)
            return
        for thin_id, device in self.devices.items():
            assert read(device, 0, SIZE) == self.now[thin_id]
        self.pool.close()
        self.check_clean(self.table)
        if have_thin_tools():
            checked = thin_check(self.table.metadata_device)
            assert checked, checked.output
        shutil.rmtree(self.folder)


def test_model():
    run_state_machine_as_test(
        DataPath,
        settings=settings(
            max_examples=12,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_long_walk_through_the_model(seed):
    """The same rules in one run of many steps, so that the pool gets old."""
    rng = random.Random(seed)
    model = DataPath()
    try:
        model.make(skip_block_zeroing=bool(seed % 2))
        for _ in range(STEPS):
            take_step(model, rng)
    finally:
        model.teardown()


def take_step(model: DataPath, rng: random.Random) -> None:
    number, begin = rng.randrange(1000), rng.randrange(UNITS)
    length = rng.choice([1, 2, 16, 32, 64, 100])
    match rng.randrange(20):
        case 0 | 1 if len(model.now) < 6:
            model.snap(number)
        case 2 if len(model.now) < 6:
            model.create()
        case 3 if len(model.now) > 1:
            model.delete(number)
        case 4 | 5 | 6 | 7 | 8:
            model.write(number, begin, length, aligned=rng.random() < 0.5)
        case 9 | 10:
            model.discard(number, begin, length, aligned=rng.random() < 0.5)
        case 11:
            model.write_zeroes(number, begin, length)
        case 12 | 13:
            model.flush(number)
        case 14:
            model.crash()
        case 15 if rng.random() < 0.2:
            model.reopen()
        case _:
            model.verify(number)
