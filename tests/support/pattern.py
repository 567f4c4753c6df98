"""Proof of isolation between thin devices: stamp a device, fork the stamps, verify every one.

A stamp says which device wrote it, where and when, so that a block that ends up in another device
or in another place is recognised, not only damage.
"""

import random
from typing import Final, Self

from devmapper.engine.embedded.device import ThinDevice

_UNIT: Final = 4096  # smaller than any data block, so that parts of blocks are written, too


class PatternStomper:
    """Expectations about the first *size* bytes of one device; starts from zeros."""

    def __init__(self, device: ThinDevice, name: str, *, size: int, seed: int = 0) -> None:
        self.device = device
        self.name = name
        self._nr_units = size // _UNIT
        self._stamps: dict[int, bytes] = {}
        self._rng = random.Random(f"{name}-{seed}")
        self._generation = 0

    def fork(self, device: ThinDevice, name: str) -> Self:
        """Expectations about a snapshot that was just taken, opened as *device*."""
        forked = type(self)(device, name, size=self._nr_units * _UNIT)
        forked._stamps = dict(self._stamps)
        return forked

    def stamp(self, writes: int) -> None:
        """Overwrite random ranges."""
        for _ in range(writes):
            self._generation += 1
            begin, length = self._range()
            stamps = [self._stamp(unit) for unit in range(begin, begin + length)]
            self._stamps.update(zip(range(begin, begin + length), stamps, strict=True))
            self.device.write(begin * _UNIT, memoryview(b"".join(stamps)))

    def discard(self, times: int) -> None:
        """Discard random ranges."""
        for _ in range(times):
            begin, length = self._range()
            self._forget(begin, length)
            self.device.discard(begin * _UNIT, length * _UNIT)

    def zero(self, times: int) -> None:
        """Write zeroes to random ranges."""
        for _ in range(times):
            begin, length = self._range()
            self._forget(begin, length)
            self.device.write_zeroes(begin * _UNIT, length * _UNIT)

    def verify(self) -> None:
        """Read everything; AssertionError names the first place that is wrong."""
        step = 64
        for begin in range(0, self._nr_units, step):
            length = min(step, self._nr_units - begin)
            found = bytearray(length * _UNIT)
            self.device.read(begin * _UNIT, memoryview(found))
            for at in range(length):
                unit = bytes(found[at * _UNIT : (at + 1) * _UNIT])
                want = self._stamps.get(begin + at, bytes(_UNIT))
                assert unit == want, (
                    f"{self.name} at {(begin + at) * _UNIT}: found {unit[:48]!r},"
                    f" expected {want[:48]!r}"
                )

    def _range(self) -> tuple[int, int]:
        length = self._rng.choice((1, 1, 3, 16, 17, 40))
        begin = self._rng.randrange(max(1, self._nr_units - length))
        return begin, min(length, self._nr_units - begin)

    def _stamp(self, unit: int) -> bytes:
        text = f"{self.name}/{unit}/{self._generation};".encode()
        return (text * (_UNIT // len(text) + 1))[:_UNIT]

    def _forget(self, begin: int, length: int) -> None:
        for unit in range(begin, begin + length):
            self._stamps.pop(unit, None)
