"""The operations of tests/suites/graphdriver, and of Docker's own benchmarks, with our driver.

`bench_docker_ours.py HOME TARGET LAYERS RUNS OPTION...`: bench_docker.py starts it in a guest.
"""

import cProfile
import json
import os
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import devmapper
from devmapper.driver import Driver

DEPTH = 64
PIECE = 32 * 1024
FILES_PER_DIRECTORY = 100

Timings = dict[str, list[float]]


class Clock:
    def __init__(self) -> None:
        self.found: Timings = {}

    @contextmanager
    def time(self, *operations: str) -> Iterator[None]:
        begin = time.perf_counter_ns()
        yield
        taken = time.perf_counter_ns() - begin
        for operation in operations:
            self.found.setdefault(operation, []).append(taken)

    def call(self, operation: str, do: Callable[[], object]) -> int:
        begin = time.perf_counter_ns()
        do()
        taken = time.perf_counter_ns() - begin
        self.found.setdefault(operation, []).append(taken)
        return taken


def layers(driver: Driver, clock: Clock, count: int) -> None:
    driver.create("timed-parent")
    fill(driver, "timed-parent", {"file": bytes(16384)})
    for number in range(count):
        layer = f"timed-{number}"
        taken = clock.call("create", lambda layer=layer: driver.create(layer, "timed-parent"))  # type: ignore[misc]
        taken += clock.call("get", lambda layer=layer: driver.get(layer))  # type: ignore[misc]
        taken += clock.call("put", lambda layer=layer: driver.put(layer))  # type: ignore[misc]
        taken += clock.call("remove", lambda layer=layer: driver.remove(layer))  # type: ignore[misc]
        clock.found.setdefault("create + get + put + remove", []).append(taken)
    for _ in range(count):
        with clock.time("get + put"):
            driver.get("timed-parent")
            driver.put("timed-parent")


def chain(driver: Driver, clock: Clock) -> None:
    driver.create("chain-0")
    with clock.time("64 layers, written and read"):
        for number in range(1, DEPTH + 1):
            layer, below = f"chain-{number}", f"chain-{number - 1}"
            driver.create(layer, below)
            fill(driver, layer, {
                "top-id": layer.encode(),
                f"layer-{number}/id": layer.encode(),
                f"layer-{number}/parent": below.encode(),
            })  # fmt: skip
        root = Path(driver.get(f"chain-{DEPTH}"))
        for number in range(DEPTH, 0, -1):
            found = (root / f"layer-{number}" / "parent").read_text()
            assert found == f"chain-{number - 1}"
        driver.put(f"chain-{DEPTH}")


def fill(driver: Driver, layer: str, files: dict[str, bytes]) -> None:
    root = Path(driver.get(layer))
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    driver.put(layer)


def content(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def three_files(seed: int) -> dict[str, bytes]:
    return {
        "file-a": content(64, seed),
        "dir-b/file-b": content(128, seed + 1),
        "file-c": content(128 * 128, seed + 2),
    }


def many_files(count: int, seed: int) -> dict[str, bytes]:
    return {
        f"directory-{number - number % FILES_PER_DIRECTORY}/file-{number}": content(
            64, seed + number
        )
        for number in range(count)
    }


def read_diff(driver: Driver, layer: str) -> None:
    with driver.diff(layer) as stream:
        while stream.read(PIECE):
            pass


def benchmarks(driver: Driver, runs: int) -> Timings:
    """What moby `daemon/graphdriver/graphtest/graphbench_unix.go` measures; means, as Go's."""
    clock = Clock()
    driver.create("empty")
    read_diff(driver, "empty")  # imports what is needed for that, once in a process
    for _ in range(runs):
        with clock.time("Exists"):
            assert driver.exists("empty")
    for _ in range(runs):
        with clock.time("GetEmpty"):
            driver.get("empty")
        driver.put("empty")

    driver.create("bottom")
    fill(driver, "bottom", three_files(3))
    for _ in range(runs):
        with clock.time("DiffBase"):
            read_diff(driver, "bottom")

    for name, bottom in (("DiffSmallUpper", 10), ("DiffLarge", 1000)):
        driver.create(f"{name}-bottom")
        fill(driver, f"{name}-bottom", many_files(bottom, 3))
        driver.create(name, f"{name}-bottom")
        fill(driver, name, many_files(10, 6))
        for _ in range(runs):
            with clock.time(name):
                read_diff(driver, name)
    diff_apply(driver, clock, runs)
    deep(driver, clock, runs)
    return {name: [statistics.mean(values)] for name, values in clock.found.items()}


def diff_apply(driver: Driver, clock: Clock, runs: int) -> None:
    driver.create("apply-base")
    fill(driver, "apply-base", many_files(100, 3))
    driver.create("apply-upper", "apply-base")
    fill(driver, "apply-upper", many_files(100, 6))
    for number in range(runs):
        target = f"apply-{number}"
        driver.create(target, "apply-base")
        with clock.time("DiffApply100"), driver.diff("apply-upper") as stream:
            driver.apply_diff(target, "", stream)


def deep(driver: Driver, clock: Clock, runs: int) -> None:
    driver.create("deep-0")
    fill(driver, "deep-0", three_files(50))
    for number in range(1, 21):
        driver.create(f"deep-{number}", f"deep-{number - 1}")
        fill(driver, f"deep-{number}", {f"layer-{number}/id": b"id", "top-id": b"top"})
    for _ in range(runs):
        with clock.time("DeepDiff20"):
            read_diff(driver, "deep-20")


def main() -> None:
    home, target, count, runs, *options = sys.argv[1:]
    driver = devmapper.init(home, options, engine="kernel")
    clock = Clock()
    profile = cProfile.Profile() if "PROFILE" in os.environ else None
    try:
        if profile:
            profile.enable()
        layers(driver, clock, int(count))
        if profile:
            profile.disable()
            pstats.Stats(profile).sort_stats("cumulative").print_stats(70)
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        chain(driver, clock)
        clock.found.update(benchmarks(driver, int(runs)))
    finally:
        driver.cleanup()
    Path(target).write_text(json.dumps(clock.found))


if __name__ == "__main__":
    main()
