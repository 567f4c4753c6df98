"""What benchmarks beside other programs share: packages, a disk, running things, medians."""

import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

IMAGE_SIZE = 6 << 30
NANOSECONDS_PER_MILLISECOND = 1e6

Timings = dict[str, list[float]]  # nanoseconds


def has_guests(name: str) -> bool:
    """Whether the benchmark *name*, which runs in a guest, can start one; if not, it says so."""
    if os.geteuid() == 0 and shutil.which("linux.uml") is not None:
        return True
    print(f"{name}: needs root and User Mode Linux (make setup)", file=sys.stderr)
    return False


def need_packages(suite: Path) -> None:
    """Install what only a benchmark with *suite* needs."""
    wanted = (suite / "apt-packages").read_text().split()
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f=${Package} ${Status}\n", *wanted],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    missing = [name for name in wanted if f"{name} install ok installed\n" not in asked]
    if missing:
        print(f"installing {' '.join(missing)}", file=sys.stderr)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )


@contextmanager
def disk() -> Iterator[Path]:
    """An ext4 in memory: what is measured is the drivers, not a disk."""
    image, point = Path("/tmp/bench.ext4"), Path("/tmp/bench")
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1", image], check=True)
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)
        image.unlink()


def run(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{argv[0]}: {done.stdout}\n{done.stderr}")
    if done.stdout and argv[0] == sys.executable:
        print(done.stdout, file=sys.stderr)
    return done.stdout


def go_benchmarks(said: str, runs: int) -> Timings:
    """What a Go test binary printed of its benchmarks, each run *runs* times.

    A driver may log between a benchmark's name and its result, which is a line of its own then.
    """
    names = re.findall(r"^Benchmark(\w+)", said, re.MULTILINE)
    results = re.findall(rf"^(?:Benchmark\w+)?\s+{runs}\s+([\d.]+) ns/op", said, re.MULTILINE)
    return {name: [float(took)] for name, took in zip(names, results, strict=True)}


def add(to: Timings, more: Timings) -> None:
    for name, values in more.items():
        to.setdefault(name, []).extend(values)


def quartiles(values: list[float]) -> tuple[float, float]:
    """Median and lower quartile, in milliseconds."""
    lower, median, _ = statistics.quantiles(values * 2, n=4, method="inclusive")
    return median / NANOSECONDS_PER_MILLISECOND, lower / NANOSECONDS_PER_MILLISECOND
