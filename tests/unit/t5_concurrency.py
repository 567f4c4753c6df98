"""Many threads on many devices of one pool."""

import functools
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.units import KIB, ThinId
from tests.support.pattern import PatternStomper
from tests.support.pools import (
    BLOCK,
    ONE,
    SIZE,
    TWO,
    Background,
    assert_clean,
    make_table,
    read,
    stop_at,
    write,
)


class TestConcurrency:
    def test_many_devices_many_threads(self, tmp_path):
        """Writers, readers, discards and snapshots at once; then every device is as expected."""
        table = make_table(tmp_path, blocks=2048)
        with EmbeddedPool.open(table, commit_period=0.02) as pool:
            next_id = iter(range(10, 10000))
            allocating = threading.Lock()

            def live(number):
                pool.create_thin(ThinId(number))
                name = str(number)
                stompers = [PatternStomper(pool.open_device(ThinId(number), SIZE), name, size=SIZE)]
                for turn in range(12):
                    stomper = stompers[turn % len(stompers)]
                    stomper.stamp(8)
                    stomper.discard(2)
                    stomper.zero(1)
                    if turn % 4 == 1:
                        with allocating:
                            snap = ThinId(next(next_id))
                        pool.create_snap(snap, stomper.device.thin_id)
                        device = pool.open_device(snap, SIZE)
                        stompers.append(stomper.fork(device, f"{name}.{snap}"))
                    if turn % 5 == 2:
                        stomper.device.flush()
                    stompers[(turn + 1) % len(stompers)].verify()
                if number % 2:
                    last = stompers.pop()
                    last.device.close()
                    pool.delete(last.device.thin_id)
                return stompers

            with ThreadPoolExecutor(6) as threads:
                stompers = [s for found in threads.map(live, range(1, 7)) for s in found]
            for stomper in stompers:
                stomper.verify()
        assert_clean(table)

    def test_one_device_under_snapshots(self, tmp_path):
        """Four writers with a region each, while snapshots are taken, read, compared and deleted.

        Each writer fills its region with one number, then the next: a snapshot between two writes
        shows one number or, in a region that is being written, a run of each.
        """
        table = make_table(tmp_path, blocks=1024)
        region = 24 * KIB  # regions share blocks
        stop = threading.Event()
        with EmbeddedPool.open(table, commit_period=0.02) as pool:
            pool.create_thin(ONE)
            device = pool.open_device(ONE, SIZE)

            def overwrite(place: int) -> None:
                number = 0
                while not stop.is_set():
                    number = (number + 1) % 256
                    for offset in range(place * region, (place + 1) * region, 4096):
                        write(device, offset, bytes([number]) * 4096)

            writers = [Background(functools.partial(overwrite, place)) for place in range(4)]
            try:
                for round_ in range(25):
                    snap_id = ThinId(100 + round_)
                    pool.create_snap(snap_id, ONE)
                    with pool.open_device(snap_id, SIZE) as snap:
                        first = read(snap, 0, 4 * region)
                        time.sleep(0.002)
                        assert read(snap, 0, 4 * region) == first
                    for place in range(4):
                        numbers = first[place * region : (place + 1) * region : 4096]
                        steps = [(b - a) % 256 for a, b in itertools.pairwise(numbers)]
                        assert sum(step != 0 for step in steps) <= 1, numbers
                        assert all(step in (0, 255) for step in steps), numbers
                    if round_ % 2:
                        pool.delete(snap_id)
            finally:
                stop.set()
                for writer in writers:
                    writer.result()
        assert_clean(table)

    def test_reads_do_not_wait_for_a_write_elsewhere(self, rig):
        rig.pool.create_thin(ONE)
        rig.pool.create_thin(TWO)
        reader, writer = (rig.pool.open_device(i, SIZE) for i in (ONE, TWO))
        write(reader, 0, b"here" * 1024)
        read(reader, 0, 512)
        inside, go_on = threading.Event(), threading.Event()
        rig.data.before_write = stop_at(inside, go_on)
        writing = Background(lambda: write(writer, 0, b"x" * BLOCK))
        assert inside.wait(60)
        committing = Background(rig.pool.commit)
        assert read(reader, 0, 4) == b"here"
        assert read(reader, 4 * BLOCK, 512) == bytes(512)
        assert writing.is_running(after=0.01)
        go_on.set()
        writing.result()
        committing.result()
