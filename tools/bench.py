"""Layers, mounts and fio on a thin device, beside a plain loop device and a qcow2 file.

`make bench`.  Everything is measured in one run, the three devices in turn in every round, so that
ratios hold although the machine's speed drifts; medians are printed.  It asserts nothing.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

FIO_CASES = {
    "write 1M qd8": ("write", "1M", 8, "MB/s"),
    "read 1M qd8": ("read", "1M", 8, "MB/s"),
    "randwrite 4k qd16": ("randwrite", "4k", 16, "IOPS"),
    "randread 4k qd16": ("randread", "4k", 16, "IOPS"),
    "randwrite 4k qd1": ("randwrite", "4k", 1, "IOPS"),
    "randread 4k qd1": ("randread", "4k", 1, "IOPS"),
    "randwrite 4k fsync": ("randwrite", "4k", 1, "IOPS"),  # a flush after each write
}


def run(*argv: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in argv], check=True, capture_output=True, text=True
    ).stdout


def need_tools() -> None:
    """Install what only the benchmark needs, or say what is missing."""
    packages = {"fio": "fio", "qemu-img": "qemu-utils", "qemu-storage-daemon": "qemu-system-common"}
    missing = [package for tool, package in packages.items() if shutil.which(tool) is None]
    if missing:
        print(f"bench: installing {' '.join(missing)}", file=sys.stderr)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )


@contextmanager
def loop_on(path: Path) -> Iterator[Path]:
    """A loop device with direct I/O, as every peer here has it."""
    device = Path(run("losetup", "--find", "--show", "--direct-io=on", path).strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def fill(device: Path, size: int) -> None:
    """Write every block once, so that no peer allocates while it is measured."""
    run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", f"count={size >> 20}", "oflag=direct",
        "conv=fsync")  # fmt: skip


@contextmanager
def plain(base: Path, size: int) -> Iterator[Path]:
    path = base / "plain"
    with path.open("wb") as file:
        file.truncate(size)
    with loop_on(path) as device:
        fill(device, size)
        yield device


@contextmanager
def qcow2(base: Path, size: int, *, cached: bool = False) -> Iterator[Path]:
    """As people export it, and with the page cache below it, which a thin device has as well."""
    name = "cached" if cached else "direct"
    image, mountpoint = base / f"{name}.qcow2", base / f"{name}.raw"
    how = "cache.direct=off" if cached else "cache.direct=on,aio=native"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
    mountpoint.touch()
    daemon = subprocess.Popen(
        [
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=file,filename={image},{how}",
            "--blockdev", "driver=qcow2,node-name=image,file=file,discard=unmap",
            "--export", f"fuse,id=export,node-name=image,mountpoint={mountpoint},writable=on",
        ]
    )  # fmt: skip
    try:
        while mountpoint.stat().st_size != size:
            if daemon.poll() is not None:
                sys.exit(f"bench: qemu-storage-daemon ended with {daemon.returncode}")
            time.sleep(0.1)
        with loop_on(mountpoint) as device:
            fill(device, size)
            yield device
    finally:
        daemon.terminate()
        daemon.wait(30)


@contextmanager
def thin(base: Path, size: int) -> Iterator[Path]:
    from devmapper.driver import init
    from devmapper.units import Bytes, ThinId

    options = [f"dm.basesize={size}", "dm.loopdatasize=8G", "dm.loopmetadatasize=128M"]
    driver = init(base / "graph", options, engine="embedded")
    try:
        driver.create("bench")
        pool, info = driver.devices.pool, driver.devices.dev_info("bench")
        device = pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        try:
            fill(device, size)
            yield device
        finally:
            pool.deactivate(info.name())
    finally:
        driver.cleanup()


def fio(device: Path, case: str, size: int, seconds: int) -> float:
    kind, block_size, depth, unit = FIO_CASES[case]
    report = json.loads(
        run("fio", "--name=x", f"--filename={device}", "--direct=1", "--ioengine=libaio",
            f"--rw={kind}", f"--bs={block_size}", f"--iodepth={depth}", f"--size={size}",
            f"--fsync={int('fsync' in case)}", "--time_based", f"--runtime={seconds}",
            "--randrepeat=1", "--output-format=json")
    )  # fmt: skip
    job = report["jobs"][0]["write" if "write" in kind else "read"]
    return float(job["bw_bytes"]) / 1e6 if unit == "MB/s" else float(job["iops"])


def bench_fio(base: Path, *, size: int, rounds: int, seconds: int) -> dict[str, dict[str, float]]:
    """Median of each case for each device, the devices in turn."""
    seen: dict[str, dict[str, list[float]]] = {case: {} for case in FIO_CASES}
    with ExitStack() as stack:
        devices = {
            name: stack.enter_context(make(base, size))
            for name, make in (
                ("plain loop", plain),
                ("qcow2", qcow2),
                ("qcow2 cached", partial(qcow2, cached=True)),
                ("thin", thin),
            )
        }
        for _ in range(rounds):
            for case in FIO_CASES:
                for name, device in devices.items():
                    seen[case].setdefault(name, []).append(fio(device, case, size, seconds))
    return {
        case: {name: statistics.median(values) for name, values in by_name.items()}
        for case, by_name in seen.items()
    }


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e3


def bench_layers(base: Path, *, base_size: str, count: int) -> dict[str, float]:
    """Milliseconds of each operation: median over *count* layers, and of the last ten created."""
    from devmapper.driver import init

    options = [f"dm.basesize={base_size}", "dm.loopdatasize=100G", "dm.loopmetadatasize=2G"]
    driver = init(base / f"layers-{base_size}", options, engine="embedded")
    result: dict[str, list[float]] = {"create": [], "get": [], "put": [], "remove": []}
    try:
        for number in range(count):
            result["create"].append(timed(partial(driver.create, f"l{number}")))
        for number in range(min(count, 30)):
            result["get"].append(timed(partial(driver.get, f"l{number}")))
            result["put"].append(timed(partial(driver.put, f"l{number}")))
        for number in range(count):
            result["remove"].append(timed(partial(driver.remove, f"l{number}")))
    finally:
        driver.cleanup()
    medians = {name: statistics.median(values) for name, values in result.items()}
    medians["create (first 10)"] = statistics.median(result["create"][:10])
    medians["create (last 10)"] = statistics.median(result["create"][-10:])
    return medians


def bench_memory(base: Path) -> dict[str, float]:
    """What a 10 GiB device with every block mapped costs, and how fast its 100 GiB pool opens."""
    from devmapper.driver import Driver, init
    from devmapper.engine.embedded import runtime
    from devmapper.units import Bytes, ThinId

    options = ["dm.basesize=10G", "dm.loopdatasize=100G", "dm.loopmetadatasize=2G"]
    home = base / "memory"

    def resident_mib(pool_name: str) -> float:
        identity = runtime.read_pid(runtime.paths_of(pool_name))
        status = Path(f"/proc/{identity.pid if identity else 0}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    driver = init(home, options, engine="embedded")
    result = {}
    try:
        driver.create("large")
        pool, info = driver.devices.pool, driver.devices.dev_info("large")
        result["engine at rest (MiB)"] = resident_mib(pool.name)
        device = pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        run("fio", "--name=x", f"--filename={device}", "--direct=1", "--ioengine=libaio",
            "--iodepth=8", "--rw=write:60k", "--bs=4k", f"--size={info.size}")  # fmt: skip
        pool.commit()
        result["blocks mapped"] = pool.thin_status(ThinId(info.device_id)).mapped_blocks
        result["after writing to every block (MiB)"] = resident_mib(pool.name)
        run("fio", "--name=x", f"--filename={device}", "--direct=1", "--ioengine=libaio",
            "--iodepth=8", "--rw=randread", "--bs=4k", "--size=10G", "--io_size=512M")  # fmt: skip
        result["after random reads all over it (MiB)"] = resident_mib(pool.name)
        pool.deactivate(info.name())
        driver.cleanup()
        opened: list[float] = []
        stack: list[Driver] = []
        for _ in range(5):
            opened.append(timed(lambda: stack.append(init(home, options, engine="embedded"))))
            stack.pop().cleanup()
        result["open the pool: engine started, base checked (ms)"] = statistics.median(opened)
        driver = init(home, options, engine="embedded")
        device = driver.devices.pool.activate(info.name(), ThinId(info.device_id), Bytes(info.size))
        begin = resident_mib(pool.name)
        run("fio", "--name=x", f"--filename={device}", "--direct=1", "--ioengine=libaio",
            "--iodepth=8", "--rw=read:60k", "--bs=4k", f"--size={info.size}")  # fmt: skip
        result["a fresh engine reading every block: growth (MiB)"] = resident_mib(pool.name) - begin
        driver.devices.pool.deactivate(info.name())
    finally:
        driver.cleanup()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--only", choices=("fio", "layers", "memory"))
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the files go")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench: needs root, for loop devices and mounts")
    need_tools()
    with tempfile.TemporaryDirectory(prefix="devmapper-bench-", dir=args.dir) as folder:
        base = Path(folder)
        if args.only in (None, "fio"):
            table = bench_fio(
                base, size=args.size_mib << 20, rounds=args.rounds, seconds=args.seconds
            )
            names = list(next(iter(table.values())))
            print(f"{'fio --direct=1':20}" + "".join(f"{name:>14}" for name in names)
                  + f"{'thin/qcow2':>14}")  # fmt: skip
            for case, row in table.items():
                ratio = row["thin"] / row["qcow2"]
                unit = FIO_CASES[case][3]
                print(f"{case:20}" + "".join(f"{row[name]:14.0f}" for name in names)
                      + f"{ratio:14.2f}  {unit}")  # fmt: skip
        if args.only in (None, "layers"):
            for base_size in ("1G", "10G"):
                print(f"\nlayers of {base_size}, {args.layers} of them (median ms)")
                row = bench_layers(base, base_size=base_size, count=args.layers)
                for name, value in row.items():
                    print(f"  {name:20}{value:9.2f}")
        if args.only in (None, "memory"):
            print("\na 10 GiB device on a pool of 100 GiB")
            for name, value in bench_memory(base).items():
                print(f"  {name:52}{value:9.1f}")


if __name__ == "__main__":
    main()
