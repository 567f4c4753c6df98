"""SIGKILL to the engine process under clients of NBD: what was flushed is there afterwards."""

import random
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from devmapper.engine.embedded.client import EmbeddedPoolClient
from devmapper.units import KIB, MIB, Bytes, ThinId
from tests.crash.test_engine_kill import KILLS
from tests.support import nbd_client
from tests.support.engine_rig import Rig
from tests.support.nbd_client import Ended, NbdClient
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse]

ONE = ThinId(1)
SIZE = Bytes(256 * MIB)
SLOT = 20 * KIB  # across blocks, and not aligned to them
SLOTS = SIZE // SLOT


class Writer:
    """Writes numbers to slots of its own, and knows which a flush has answered for."""

    def __init__(self, client: NbdClient, first: int, known: dict[int, int]) -> None:
        self._client = client
        self._first = first
        self._pending: dict[int, int] = {}
        self.durable = dict(known)
        self.latest = dict(known)
        self.flushes = 0
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        chance = random.Random(self._first)
        number = max(self.latest.values(), default=0)
        with suppress(Ended, OSError):
            while True:
                number += 1
                slot = chance.randrange(self._first, SLOTS, 2)
                self.latest[slot] = number
                fua = nbd_client.FUA if chance.random() < 0.1 else 0
                self._client.write(slot * SLOT, content(number), flags=fua)
                self._pending[slot] = number
                if fua:
                    self.durable[slot] = number
                if chance.random() < 0.1:
                    pending, self._pending = self._pending, {}
                    assert self._client.call(nbd_client.FLUSH) == 0
                    self.durable |= pending
                    self.flushes += 1


def all_flushed(writers: list[Writer]) -> bool:
    return all(writer.flushes for writer in writers)


def content(number: int) -> bytes:
    return number.to_bytes(8, "big") * (SLOT // 8)


@pytest.fixture
def chance() -> random.Random:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return random.Random(seed)


def serve(pool: EmbeddedPoolClient) -> str:
    return str(pool.serve_nbd("disk", ONE, SIZE, None, read_only=False).socket)


def test_what_was_flushed_survives(rig: Rig, chance: random.Random) -> None:
    pool = rig.activate()
    pool.create_thin(ONE)
    durable: list[dict[int, int]] = [{}, {}]
    latest: list[dict[int, int]] = [{}, {}]
    for round_number in range(KILLS):
        path = serve(pool)
        with NbdClient.ready(path) as reader:
            for before, last in zip(durable, latest, strict=True):
                check(reader, before, last)
            # What is there now is what counts from now on
            for each in (*durable, *latest):
                for slot in each:
                    each[slot] = number_at(reader, slot)
            assert reader.call(nbd_client.FLUSH) == 0
        with NbdClient.ready(path) as one, NbdClient.ready(path) as two:
            writers = [Writer(each, n, durable[n]) for n, each in enumerate((one, two))]
            for writer in writers:
                writer.thread.start()
            wait_for(partial(all_flushed, writers), "no flush came through")
            time.sleep(chance.uniform(0.0, 0.4))
            if round_number % 2:
                pool.create_snap(ThinId(100 + round_number), ONE)
            rig.kill()
            for writer in writers:
                writer.thread.join(30)
                assert not writer.thread.is_alive()
        durable = [writer.durable for writer in writers]
        latest = [writer.latest for writer in writers]
        rig.check()  # the pool is at a commit, as it lies on the disk
        pool = rig.activate()
    with NbdClient.ready(serve(pool)) as reader:
        for before, last in zip(durable, latest, strict=True):
            check(reader, before, last)


def check(reader: NbdClient, durable: dict[int, int], latest: dict[int, int]) -> None:
    """Each slot has what was flushed last, or what was written after that."""
    for slot, number in durable.items():
        assert number <= number_at(reader, slot) <= latest[slot], slot


def number_at(reader: NbdClient, slot: int) -> int:
    """The highest number in a slot; one that the kill has torn holds two."""
    data = reader.read(slot * SLOT, SLOT)
    return max(int.from_bytes(data[n : n + 8], "big") for n in range(0, SLOT, 512))


def test_a_killed_engine_leaves_a_socket_that_the_next_one_replaces(
    rig: Rig, tmp_path: Path
) -> None:
    pool = rig.activate()
    pool.create_thin(ONE)
    pool.commit()
    path = tmp_path / "chosen"
    pool.serve_nbd("disk", ONE, SIZE, path, read_only=False)
    with NbdClient.ready(path) as client:
        rig.kill()
        assert client.has_ended()
    assert path.exists()
    pool = rig.activate()
    assert pool.devices() == []
    pool.serve_nbd("disk", ONE, SIZE, path, read_only=False)
    with NbdClient.ready(path) as client:
        assert client.read(0, 512) == bytes(512)
    pool.deactivate("disk")
    assert not path.exists()


def test_a_client_that_is_killed_amid_a_write_leaves_the_device_free(rig: Rig) -> None:
    pool = rig.activate()
    pool.create_thin(ONE)
    client = NbdClient.ready(serve(pool))
    client.ask(nbd_client.WRITE, 0, MIB, b"x" * 1000)
    client.close()
    pool.deactivate("disk")
    assert pool.thin_status(ONE).mapped_blocks == 0
