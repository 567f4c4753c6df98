"""How long the difference of a large layer takes when little has changed: `make bench-diff`.

A layer of 1 GiB in 20,000 files, and one on top of it in which ten have changed.  `diff` is read
to its end with cold caches, once as it is and once with the walk of both trees in full.  It asserts
nothing but that the two archives are equal.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

from devmapper.deviceset import delta
from devmapper.driver import Driver, init
from devmapper.units import GIB

FILES_IN_DIRECTORY = 100


def options(file_system: str) -> tuple[str, ...]:
    return (
        f"dm.fs={file_system}",
        "dm.basesize=4G",
        "dm.loopdatasize=6G",
        "dm.override_udev_sync_check=true",
    )


def plant(root: Path, files: int, size: int) -> None:
    content = os.urandom(size)
    for number in range(files):
        directory = root / f"d{number // FILES_IN_DIRECTORY}"
        directory.mkdir(exist_ok=True)
        (directory / f"f{number}").write_bytes(content)


def change(root: Path, files: int, count: int) -> None:
    for number in range(0, files, files // count):
        path = root / f"d{number // FILES_IN_DIRECTORY}" / f"f{number}"
        with path.open("r+b") as file:
            file.write(os.urandom(100))


def timed_diff(driver: Driver, threshold: int) -> tuple[float, str]:
    """Seconds, and a digest of the archive, with layers of *threshold* files compared in full."""
    delta.FEWEST_INODES = threshold  # type: ignore[misc]
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    digest = hashlib.sha256()
    begin = time.perf_counter()
    with driver.diff("child", "parent") as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return time.perf_counter() - begin, digest.hexdigest()


def measure(home: Path, engine: str, file_system: str, files: int, rounds: int) -> None:
    with init(home, options(file_system), engine=engine) as driver:  # type: ignore[arg-type]
        try:
            driver.create("parent")
            plant(Path(driver.get("parent")), files, GIB // files)
            driver.put("parent")
            driver.create("child", "parent")
            change(Path(driver.get("child")), files, 10)
            driver.put("child")
            fast, full, digests = [], [], set()
            for _ in range(rounds):
                for seconds, threshold in ((fast, 0), (full, 1 << 62)):
                    took, digest = timed_diff(driver, threshold)
                    seconds.append(took)
                    digests.add(digest)
            if len(digests) != 1:
                raise SystemExit("the archives are not equal")
            one, other = statistics.median(fast), statistics.median(full)
            print(
                f"{file_system}, {files} files, 10 changed: changed blocks {one:.3f} s,"
                f" both trees {other:.3f} s, ratio {one / other:.3f}"
            )
        finally:
            driver.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="auto", choices=("auto", "kernel", "embedded"))
    parser.add_argument("--fs", action="append", choices=("ext4", "xfs"), help="both by default")
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; /var/tmp by default")
    words = parser.parse_args()
    for file_system in words.fs or ("ext4", "xfs"):
        with tempfile.TemporaryDirectory(dir=words.directory or "/var/tmp") as directory:
            home = Path(directory) / "graph"
            measure(home, words.engine, file_system, words.files, words.rounds)


if __name__ == "__main__":
    main()
