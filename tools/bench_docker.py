"""Our driver on the kernel engine beside Docker's own, in one boot of User Mode Linux.

`make bench-docker`.  The same operations, the same options, the same file system below: Docker's
driver in a Go program with Docker's own benchmarks (tests/suites/graphdriver), ours in a Python
process.  They run in turn, each with a fresh graph every round; medians are printed as a table in
Markdown.  It asserts nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarking import (
    Timings,
    add,
    disk,
    go_benchmarks,
    has_guests,
    need_packages,
    quartiles,
    run,
)

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
SUITE = CHECKOUT / "tests" / "suites" / "graphdriver"
OPTIONS = (
    "dm.fs=ext4",
    "dm.loopdatasize=2G",
    "dm.loopmetadatasize=64M",
    "dm.basesize=512M",
    "dm.override_udev_sync_check=true",
)
REMOVALS = ("deferred", "waiting")
# Go stops its timer in every run, which takes milliseconds in a guest: longer than to read a file
LEFT_OUT = ("DeepRead20",)


def on_the_host(options: argparse.Namespace) -> int:
    sys.path.insert(0, str(CHECKOUT))
    from tests.uml.boot import Machine
    from tests.uml.guest import run_in_uml

    need_packages(SUITE)
    with tempfile.TemporaryDirectory(prefix="bench-docker-", dir="/var/tmp") as folder:
        out = Path(folder)
        subprocess.run([SUITE / "build", out / "suite"], check=True)
        argv = [
            sys.executable, str(HERE / "bench_docker.py"), "--guest", str(out),
            "--rounds", str(options.rounds), "--layers", str(options.layers),
            "--benchtime", str(options.benchtime),
            "--removal", *options.removal,
            *(["--profile"] if options.profile else []),
        ]  # fmt: skip
        return run_in_uml(argv, Machine(memory="4G", writable=(out,)))


def in_the_guest(options: argparse.Namespace) -> int:
    out = options.guest
    tables: dict[str, tuple[Timings, Timings]] = {removal: ({}, {}) for removal in options.removal}
    with disk() as scratch:
        for number in range(options.rounds):
            for removal, (theirs, own) in tables.items():
                print(f"round {number + 1} of {options.rounds}: {removal}", file=sys.stderr)
                add(theirs, dockers(out / "suite", scratch, options, removal))
                add(own, ours(scratch, options, removal))
    for removal, (theirs, own) in tables.items():
        print(f"\n### Removal of devices: {removal}\n")
        print_table(theirs, own)
    return 0


def driver_options(removal: str) -> tuple[str, ...]:
    """Docker's default is deferred removal wherever the kernel can, ours is to wait."""
    wanted = "true" if removal == "deferred" else "false"
    return (*OPTIONS, f"dm.use_deferred_removal={wanted}", f"dm.use_deferred_deletion={wanted}")


def dockers(suite: Path, scratch: Path, options: argparse.Namespace, removal: str) -> Timings:
    environment = {
        **os.environ,
        "TMPDIR": str(scratch),
        "GRAPH_DRIVER": "devicemapper",
        "GRAPH_OPTS": ",".join(driver_options(removal)),
        "TIMINGS": str(scratch / "timings.json"),
        "TIMINGS_LAYERS": str(options.layers),
    }
    run([str(suite), "-test.run", "TestTimings"], environment)
    found: Timings = json.loads((scratch / "timings.json").read_text())
    said = run(
        [str(suite), "-test.run", "NONE", "-test.bench", ".",
         f"-test.benchtime={options.benchtime}x"], environment,
    )  # fmt: skip
    measured = go_benchmarks(said, options.benchtime)
    found.update({name: took for name, took in measured.items() if name not in LEFT_OUT})
    return found


def ours(scratch: Path, options: argparse.Namespace, removal: str) -> Timings:
    with tempfile.TemporaryDirectory(dir=scratch) as home:
        target = scratch / "timings.json"
        run(
            [sys.executable, str(HERE / "bench_docker_ours.py"), home, str(target),
             str(options.layers), str(options.benchtime), *driver_options(removal)],
            {**os.environ, **({"PROFILE": "1"} if options.profile else {})},
        )  # fmt: skip
        found: Timings = json.loads(target.read_text())
        return found


def print_table(docker: Timings, own: Timings) -> None:
    """Medians; on a busy machine the quicker quarter of all tells more of the drivers."""
    print("| operation (ms) | Docker's driver | ours | ratio | ratio of lower quartiles |")
    print("|---|---|---|---|---|")
    for name in docker:
        theirs, their_quarter = quartiles(docker[name])
        mine, my_quarter = quartiles(own[name])
        print(
            f"| {name} | {theirs:.3g} | {mine:.3g} | {mine / theirs:.2f} |"
            f" {my_quarter / their_quarter:.2f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layers", type=int, default=15, help="layers of each round")
    parser.add_argument("--benchtime", type=int, default=10, help="runs of each Go benchmark")
    parser.add_argument(
        "--removal", nargs="+", choices=REMOVALS, default=REMOVALS, help="of devices; default both"
    )
    parser.add_argument("--profile", action="store_true", help="print where our time goes")
    parser.add_argument("--guest", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.guest is not None:
        return in_the_guest(options)
    return on_the_host(options) if has_guests("bench-docker") else 1


if __name__ == "__main__":
    sys.exit(main())
