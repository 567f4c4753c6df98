"""Makes the metadata images of tests/data: run `python -m tests.data.scripts.make_images`.

Needs thin-provisioning-tools 0.9.0; the tests that read the images do not.
"""

import random
import tempfile
from pathlib import Path
from typing import Final

import zstandard
from tests.support.fixtures import DATA
from tests.support.metadata_writer import Image, Run, Thin, build, pool_xml
from tests.support.thin_tools import thin_check, thin_dump, thin_ls

LS_FIELDS: Final = (
    "DEV,MAPPED_BLOCKS,EXCLUSIVE_BLOCKS,SHARED_BLOCKS,TRANSACTION,CREATE_TIME,SNAP_TIME"
)


def snapshots() -> dict[int, Thin]:
    chance = random.Random(20)
    made = {}
    for thin_id in range(1, 41):
        own = sorted(chance.sample(range(600), 8))
        runs = []
        for block in range(600):
            data, time = (1000 * thin_id + block, thin_id) if block in own else (block, 0)
            runs.append(Run(block, data, 1, time))
        made[thin_id] = Thin(tuple(runs), thin_id, thin_id, thin_id + 1)
    return made


def deep() -> dict[int, Thin]:
    runs = [Run(3 * i, 20_000 + (7919 * i) % 39_989, 1, i % 3) for i in range(19_000)]
    runs.append(Run(100_000, 0, 20_000, 2))
    return {5: Thin(tuple(runs), 1, 0, 0)}


def held() -> dict[int, Thin]:
    return {
        i: Thin((Run(0, 0, 300, 0), Run(1000 * i, 300 + 100 * i, 50, i)), i, i, 0)
        for i in (1, 2, 3)
    }


def save(name: str, image: Image) -> None:
    checked = thin_check(image.path)
    assert checked, checked.output
    packed = zstandard.ZstdCompressor(level=19).compress(image.path.read_bytes())
    (DATA / f"{name}.bin.zst").write_bytes(packed)
    dumped = zstandard.ZstdCompressor(level=19).compress(thin_dump(image.path).encode())
    (DATA / f"{name}.xml.zst").write_bytes(dumped)
    listed = thin_ls(image.path, "--no-headers", "-o", LS_FIELDS)
    (DATA / f"{name}.ls").write_text(listed)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, thins in (("empty", {}), ("snapshots", snapshots()), ("deep", deep())):
            save(name, build(Path(folder) / f"{name}.bin", pool_xml(thins)))
        image = build(Path(folder) / "held.bin", pool_xml(held()))
        image.hold_metadata_snap()
        save("held", image)


if __name__ == "__main__":
    main()
