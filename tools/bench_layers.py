"""How long a layer takes when there are many: `make bench-layers`.

Makes COUNT layers one after the other, each a snapshot of the one before as an image has them or,
with --flat, of the base, and prints what making, mounting, unmounting and removing takes for the
10th, 100th, 1000th, and opening the graph then.  Each figure is the median of nine layers around
that one.  It asserts nothing.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devmapper.driver import Driver, init

OPTIONS = (
    "dm.basesize=1G",
    "dm.loopdatasize=20G",
    "dm.loopmetadatasize=1G",
    "dm.override_udev_sync_check=true",
)
AROUND = 4  # layers on each side of the one that is shown

Times = dict[str, list[float]]


@contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    times.setdefault(name, []).append(time.perf_counter() - begin)


def make(driver: Driver, number: int, times: Times, *, flat: bool) -> None:
    """Make layer *number*, use it, and make and remove another beside it."""
    parent = "" if flat or number == 1 else f"layer{number - 1}"
    layer = f"layer{number}"
    with timed(times, "create"):
        driver.create(layer, parent)
    with timed(times, "get"):
        root = Path(driver.get(layer))
    (root / f"file{number}").write_text(layer)
    with timed(times, "put"):
        driver.put(layer)
    driver.create("beside", layer)
    with timed(times, "remove"):
        driver.remove("beside")


def measure(home: Path, engine: str, count: int, *, flat: bool) -> None:
    shown = [n for n in (10, 100, 1000, 10_000) if n + AROUND <= count]
    wanted = {near for n in shown for near in range(n - AROUND, n + AROUND + 1)}
    found: dict[int, Times] = {}
    driver = init(home, OPTIONS, engine=engine)  # type: ignore[arg-type]
    try:
        for number in range(1, count + 1):
            make(driver, number, found.setdefault(number, {}), flat=flat)
            if number not in wanted:
                del found[number]
        driver.close()
        print(f"{'milliseconds':14}" + "".join(f"{f'layer {n}':>12}" for n in shown))
        for name in ("create", "get", "put", "remove"):
            cells = [
                statistics.median(
                    found[near][name][0] for near in range(n - AROUND, n + AROUND + 1)
                )
                for n in shown
            ]
            print(f"{name:14}" + "".join(f"{seconds * 1000:12.2f}" for seconds in cells))
        for name, again in (("pool active", False), ("pool inactive", True)):
            if again:
                init(home, OPTIONS, engine=engine).cleanup()  # type: ignore[arg-type]
            times: Times = {}
            with timed(times, "open"):
                driver = init(home, OPTIONS, engine=engine)  # type: ignore[arg-type]
            print(f"open with {count} layers, {name}: {times['open'][0] * 1000:.1f} ms")
            driver.close()
    finally:
        init(home, OPTIONS, engine=engine).cleanup()  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="auto", choices=("auto", "kernel", "embedded"))
    parser.add_argument("--count", type=int, default=1010)
    parser.add_argument("--flat", action="store_true", help="every layer a snapshot of the base")
    parser.add_argument("--directory", type=Path, help="where to work; /var/tmp by default")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.directory or "/var/tmp") as directory:
        measure(Path(directory) / "graph", words.engine, words.count, flat=words.flat)


if __name__ == "__main__":
    main()
