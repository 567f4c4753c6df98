"""Devices of a pool that log what is done to them, and what a power failure leaves of it.

The two devices are apart: a flush of one says nothing about the other.  What was written to a
device before the last flush of it is there; of what came later any subset may be.  4 KiB are whole.
"""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from devmapper.engine.embedded.data_file import DataFile
from devmapper.thin.blocks import MemoryDevice
from devmapper.thin.format import ZERO_BLOCK

UNIT: Final = 4096
NOTHING: Final = bytes(UNIT)


class Event(NamedTuple):
    """Something that was done to a device.

    `unit` and `content` are those of a write (None: a punched hole); a flush has `covers`, the
    number of events that had happened when it began.
    """

    device: str
    unit: int = -1
    content: bytes | None = None
    covers: int = -1


class PowerLog:
    """Events of both devices in the order in which they happened."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.events)

    def write(self, device: str, offset: int, data: bytes) -> None:
        with self._lock:
            for at in range(0, len(data), UNIT):
                unit = (offset + at) // UNIT
                self.events.append(Event(device, unit, data[at : at + UNIT]))

    def punch(self, device: str, offset: int, length: int) -> None:
        with self._lock:
            for at in range(offset, offset + length, UNIT):
                self.events.append(Event(device, at // UNIT))

    def flush(self, device: str, run: Callable[[], None]) -> None:
        begin = len(self.events)
        run()
        with self._lock:
            self.events.append(Event(device, covers=begin))

    def image(self, device: str, cut: int, rng: random.Random | None) -> dict[int, bytes]:
        """What *device* holds if power fails after *cut* events; None keeps nothing unflushed."""
        events = self.events[:cut]
        covered = max((e.covers for e in events if e.device == device), default=-1)
        chance = rng.choice((0.0, 0.5, 1.0)) if rng is not None else 0.0
        found: dict[int, bytes] = {}
        for number, event in enumerate(events):
            if event.device != device or event.unit < 0:
                continue
            if number < covered or (rng is not None and rng.random() < chance):
                found[event.unit] = event.content or NOTHING
        return found


class LoggedDataFile(DataFile):
    """Writes in whole units only, which is what the tests do."""

    log: PowerLog

    @classmethod
    def logging_to(cls, path: Path, log: PowerLog) -> "LoggedDataFile":
        self = cls.open(path)
        self.log = log
        self._zeroes = False  # zeros are written, so that they are seen here
        return self

    def write(self, view: memoryview, offset: int) -> None:
        super().write(view, offset)
        self.log.write("data", offset, bytes(view))

    def punch(self, offset: int, length: int) -> bool:
        done = super().punch(offset, length)
        self.log.punch("data", offset, length)
        return done

    def sync(self) -> None:
        if self.unsynced:
            self.log.flush("data", super().sync)


class LoggedMetadata(MemoryDevice):
    """A metadata device whose units are its blocks."""

    def __init__(self, nr_blocks: int, log: PowerLog) -> None:
        super().__init__(nr_blocks)
        self.log = log

    def write(self, block: int, data: bytes) -> None:
        super().write(block, data)
        self.log.write("metadata", block * UNIT, bytes(data))

    def flush(self) -> None:
        self.log.flush("metadata", super().flush)


def memory_of(image: dict[int, bytes], nr_blocks: int) -> MemoryDevice:
    """The metadata device that *image* describes."""
    device = MemoryDevice(nr_blocks)
    for block in range(nr_blocks):
        device.write(block, image.get(block, ZERO_BLOCK))
    return device


def write_file(path: Path, image: dict[int, bytes], size: int) -> None:
    """Make *path* a sparse file that holds *image*."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
        for unit, content in image.items():
            os.pwrite(file.fileno(), content, unit * UNIT)
