"""A metadata device that logs what is done to it, and the disks a crash may leave behind."""

import random
from collections.abc import Iterator

from devmapper.thin.blocks import MemoryDevice
from devmapper.thin.format import ZERO_BLOCK

Image = dict[int, bytes]


class RecordingDevice(MemoryDevice):
    """Writes since the start, grouped by the flushes between them."""

    def __init__(self, nr_blocks: int) -> None:
        super().__init__(nr_blocks)
        self.groups: list[list[tuple[int, bytes]]] = [[]]

    def write(self, block: int, data: bytes) -> None:
        super().write(block, data)
        self.groups[-1].append((block, data))

    def flush(self) -> None:
        super().flush()
        self.groups.append([])

    def image(self) -> Image:
        return dict(self._blocks)

    @classmethod
    def of(cls, image: Image, nr_blocks: int) -> "RecordingDevice":
        device = cls(nr_blocks)
        device._blocks = dict(image)
        return device


def crash_images(
    before: Image, groups: list[list[tuple[int, bytes]]], *, seed: int, subsets: int
) -> Iterator[Image]:
    """Disks after a power failure: whole groups, then any subset of the writes of one group.

    Writes between two flushes may arrive in any order and in part; those before a flush are there.
    """
    rng = random.Random(seed)
    durable = dict(before)
    for group in groups:
        yield dict(durable)
        for _ in range(subsets if group else 0):
            image = dict(durable)
            kept = rng.sample(group, rng.randint(0, len(group)))
            image.update(kept)
            yield image
        durable.update(group)
    yield durable


def save(image: Image, nr_blocks: int) -> bytes:
    """The image as the bytes of a file."""
    return b"".join(image.get(block, ZERO_BLOCK) for block in range(nr_blocks))
