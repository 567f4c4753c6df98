"""Docker's plugin and containerd's snapshotter beside what Docker and containerd have themselves.

`make bench-clients`: in one boot of User Mode Linux, by the same Go benchmarks (tests/suites), in
turn in every round.  containerd's own devmapper and overlayfs are asked through containerd, ours
through containerd (as a proxy plugin) and directly; Docker's own driver works inside the Go
program, ours through the plugin's socket.  Medians, as a table and as a plot (docs/benchmarks.svg).
It asserts nothing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bar_chart import Bar, draw
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
SNAPSHOTTER = CHECKOUT / "tests" / "suites" / "snapshotter"
GRAPHDRIVER = CHECKOUT / "tests" / "suites" / "graphdriver"
PLOT = CHECKOUT / "docs" / "benchmarks-clients.svg"
GRAPH = ("dm.fs=ext4", "dm.loopmetadatasize=128M", "dm.override_udev_sync_check=true")
SMALL = (*GRAPH, "dm.loopdatasize=2G", "dm.basesize=512M")
LARGE = (*GRAPH, "dm.loopdatasize=5G", "dm.basesize=4G")
POOL = "bench-containerd"
POOL_DATA = 4 << 30
POOL_METADATA = 128 << 20
SECTOR = 512
DEEP = "TestSnapshotter/128LayersMount"
CONTAINERDS = "containerd's devmapper"
OVERLAY = "overlayfs"
PROXIED = "ours through containerd"
DIRECT = "ours"
DOCKERS = "Docker's driver"
# Go stops its timer in every run, which takes milliseconds in a guest: longer than to read a file
LEFT_OUT = ("DeepRead20",)
_START_SECONDS = 60.0


def on_the_host(options: argparse.Namespace) -> int:
    sys.path.insert(0, str(CHECKOUT))
    from tests.uml.boot import Machine
    from tests.uml.guest import run_in_uml

    suites = {"snapshotter": SNAPSHOTTER} if "containerd" in options.only else {}
    if {"docker", "diff"} & set(options.only):
        suites["graphdriver"] = GRAPHDRIVER
    with tempfile.TemporaryDirectory(prefix="bench-clients-", dir="/var/tmp") as folder:
        out = Path(folder)
        for name, suite in suites.items():
            need_packages(suite)
            subprocess.run([suite / "build", out / name], check=True)
        argv = [
            sys.executable, str(HERE / "bench_clients.py"), "--guest", str(out),
            "--rounds", str(options.rounds), "--runs", str(options.runs),
            "--files", str(options.files), "--only", *options.only,
        ]  # fmt: skip
        status = run_in_uml(argv, Machine(memory="6G", writable=(out,)))
        if status == 0 and (out / "plot.svg").exists():
            shutil.copyfile(out / "plot.svg", PLOT)
            print(f"\nplot: {PLOT.relative_to(CHECKOUT)}")
        return status


def in_the_guest(options: argparse.Namespace) -> int:
    bars: list[Bar] = []
    with disk() as scratch:
        if "containerd" in options.only:
            bars += containerd_part(options, scratch)
        if "docker" in options.only:
            bars += docker_part(options, scratch)
        if "diff" in options.only:
            bars += diff_part(options, scratch)
    if bars:
        (options.guest / "plot.svg").write_text(draw(bars))
    return 0


# containerd


def containerd_part(options: argparse.Namespace, scratch: Path) -> list[Bar]:
    suite = options.guest / "snapshotter"
    found: dict[str, Timings] = {}
    with (
        daemon(scratch / "ours", SMALL) as sockets,
        own_pool(scratch),
        containerd(scratch, sockets),
    ):
        clients = {
            CONTAINERDS: (scratch / "containerd.sock", "devmapper"),
            OVERLAY: (scratch / "containerd.sock", "overlayfs"),
            PROXIED: (scratch / "containerd.sock", "ours"),
            DIRECT: (sockets / "containerd.sock", "ours"),
        }
        for number in range(options.rounds):
            for name, (socket, snapshotter) in clients.items():
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
                environment = asking(socket, snapshotter, scratch)
                said = run(
                    [str(suite), "-test.run", "NONE", "-test.bench", ".",
                     f"-test.benchtime={options.runs}x"], environment,
                )  # fmt: skip
                add(found.setdefault(name, {}), go_benchmarks(said, options.runs))
        for name, (socket, snapshotter) in clients.items():
            print(f"128 layers: {name}", file=sys.stderr)
            said = run(
                [str(suite), "-test.run", DEEP, "-test.v", "-test.root", "-test.parallel", "1"],
                asking(socket, snapshotter, scratch),
            )
            took = re.search(rf"--- PASS: {DEEP} \(([\d.]+)s\)", said)
            if took is None:
                sys.exit(f"{DEEP} of {name} did not pass:\n{said}")
            add(found[name], {"128 layers, written and mounted": [float(took[1]) * 1e9]})
    return table("containerd", found, against=CONTAINERDS)


def asking(socket: Path, snapshotter: str, scratch: Path) -> dict[str, str]:
    return {
        **os.environ,
        "TMPDIR": str(scratch),
        "SNAPSHOTTER_SOCK": str(socket),
        "SNAPSHOTTER_NAME": snapshotter,
    }


@contextmanager
def containerd(scratch: Path, sockets: Path) -> Iterator[None]:
    """containerd with its own devmapper on its own pool, overlayfs, and ours as a proxy plugin."""
    root = scratch / "containerd"
    root.mkdir()
    config = root / "config.toml"
    config.write_text(f"""version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{scratch}/containerd.sock"
[plugins."io.containerd.snapshotter.v1.devmapper"]
  root_path = "{root}/devmapper"
  pool_name = "{POOL}"
  base_image_size = "512MB"
  fs_type = "ext4"
[proxy_plugins.ours]
  type = "snapshot"
  address = "{sockets}/containerd.sock"
""")
    with process(["containerd", "--config", str(config)], root / "log"):
        wait_for(scratch / "containerd.sock")
        yield


@contextmanager
def own_pool(scratch: Path) -> Iterator[None]:
    """A thin pool as containerd's documentation has it made: on two loop devices."""
    loops = []
    for name, size in (("metadata", POOL_METADATA), ("data", POOL_DATA)):
        file = scratch / f"pool-{name}"
        with file.open("wb") as out:
            out.truncate(size)
        loops.append(run(["losetup", "--find", "--show", str(file)], os.environ).strip())
    table_line = (
        f"0 {POOL_DATA // SECTOR} thin-pool {loops[0]} {loops[1]} 128 32768 1 skip_block_zeroing"
    )
    run(["dmsetup", "create", POOL, "--table", table_line], os.environ)
    try:
        yield
    finally:
        left = run(["dmsetup", "ls"], os.environ).split()
        for name in [word for word in left if word.startswith(f"{POOL}-")]:
            run(["dmsetup", "remove", name], os.environ)
        run(["dmsetup", "remove", POOL], os.environ)
        for device in loops:
            run(["losetup", "--detach", device], os.environ)


# Docker


def docker_part(options: argparse.Namespace, scratch: Path) -> list[Bar]:
    found: dict[str, Timings] = {}
    for number in range(options.rounds):
        for name in (DOCKERS, DIRECT):
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            with graph_driver(name, scratch, SMALL) as environment:
                said = run(
                    [str(options.guest / "graphdriver"), "-test.run", "NONE", "-test.bench", ".",
                     f"-test.benchtime={options.runs}x"], environment,
                )  # fmt: skip
            measured = go_benchmarks(said, options.runs)
            kept = {name: took for name, took in measured.items() if name not in LEFT_OUT}
            add(found.setdefault(name, {}), kept)
    return table("Docker", found, against=DOCKERS)


def diff_part(options: argparse.Namespace, scratch: Path) -> list[Bar]:
    found: dict[str, Timings] = {}
    for name in (DOCKERS, DIRECT):
        print(f"diff of a large layer: {name}", file=sys.stderr)
        target = scratch / "large.json"
        with graph_driver(name, scratch, LARGE) as environment:
            more = {"LARGE_DIFF": str(target), "LARGE_DIFF_FILES": str(options.files)}
            run(
                [str(options.guest / "graphdriver"), "-test.run", "TestLargeDiff"],
                {**environment, **more},
            )
        add(found.setdefault(name, {}), json.loads(target.read_text()))
    return table("Docker, large layers", found, against=DOCKERS)


@contextmanager
def graph_driver(name: str, scratch: Path, options: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The environment in which the Go program uses the driver of that name."""
    common = {**os.environ, "TMPDIR": str(scratch)}
    if name == DOCKERS:
        # Docker's default where the kernel can, as ours below
        yield {**common, "GRAPH_DRIVER": "devicemapper", "GRAPH_OPTS": ",".join(options)}
        return
    with daemon(scratch / "ours", options) as sockets:
        yield {**common, "GRAPH_DRIVER": "plugin", "PLUGIN_SOCK": str(sockets / "docker.sock")}


# The daemon, processes


@contextmanager
def daemon(home: Path, options: tuple[str, ...]) -> Iterator[Path]:
    """`devmapper serve` with a new graph; yields the directory of its sockets."""
    sockets = Path(tempfile.mkdtemp(prefix="sockets-", dir="/run"))
    config = sockets / "config.toml"
    opts = ", ".join(f'"{option}"' for option in options)
    config.write_text(f"""root = "{home}"
engine = "kernel"
storage-opts = [{opts}]
on-stop = "release"
log-level = "warning"
[control]
socket = "{sockets}/control.sock"
[docker]
socket = "{sockets}/docker.sock"
[containerd]
socket = "{sockets}/containerd.sock"
""")
    serve = [sys.executable, "-m", "devmapper.cli.main", "serve", "--config", str(config)]
    try:
        with process(serve, sockets / "log"):
            for name in ("docker", "containerd"):
                wait_for(sockets / f"{name}.sock")
            yield sockets
    finally:
        shutil.rmtree(sockets)
        shutil.rmtree(home)


@contextmanager
def process(argv: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        running = subprocess.Popen(argv, stdout=out, stderr=out)
    try:
        yield
    except BaseException:
        print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        running.terminate()
        running.wait(_START_SECONDS)


def wait_for(socket: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not socket.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(str(socket))
        time.sleep(0.05)


def table(title: str, found: dict[str, Timings], *, against: str) -> list[Bar]:
    """Print medians and their ratios; what the plot shows of them."""
    others = [name for name in found if name != against]
    print(f"\n### {title}\n")
    print(f"| operation (ms) | {against} | " + " | ".join(f"{n} | ratio" for n in others) + " |")
    print("|---|---" + "|---|---" * len(others) + "|")
    bars = []
    for operation, values in found[against].items():
        theirs, _ = quartiles(values)
        cells = []
        for name in others:
            ours, _ = quartiles(found[name][operation])
            cells.append(f"{ours:.3g} | {ours / theirs:.2f}")
            bars.append(Bar(f"{title}: {operation}", name, ours / theirs))
        print(f"| {operation} | {theirs:.3g} | " + " | ".join(cells) + " |")
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=20, help="runs of each Go benchmark")
    parser.add_argument("--files", type=int, default=20000, help="files of the large layer")
    parts = ("containerd", "docker", "diff")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--guest", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.guest is not None:
        return in_the_guest(options)
    return on_the_host(options) if has_guests("bench-clients") else 1


if __name__ == "__main__":
    sys.exit(main())
