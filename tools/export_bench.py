"""What the FUSE export costs: fio on it, beside a plain loop device and a qcow2 file, in turn.

    PYTHONPATH=src:. python -m tools.export_bench [--rounds 3] [--seconds 3]

All of them have their data in a file in the page cache and a loop device with direct I/O on top.
"export" is a file passed through, which is what the protocol adapter can do at best; "thin" is a
device of a pool behind the same adapter.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.support.export_server import ExportServer
from tools.bench import FIO_CASES, fill, fio, need_tools, plain, qcow2

from devmapper.linux import loop


@contextmanager
def export(base: Path, size: int) -> Iterator[Path]:
    mountpoint, path = base / "export", base / "passed-through"
    mountpoint.mkdir()
    with open(path, "wb") as file:
        file.truncate(size)
    with ExportServer(mountpoint) as server:
        server.ask("add_file", "disk", str(path))
        with loop.attached(mountpoint / "disk") as device:
            fill(device, size)
            yield device


@contextmanager
def thin(base: Path, size: int) -> Iterator[Path]:
    mountpoint, pool = base / "thin", base / "pool"
    mountpoint.mkdir()
    pool.mkdir()
    with ExportServer(mountpoint) as server:
        server.ask("add_thin", "disk", str(pool), size)
        with loop.attached(mountpoint / "disk") as device:
            fill(device, size)
            yield device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    args = parser.parse_args()
    need_tools()
    size = args.size_mib << 20
    makers = {
        "plain loop": plain,
        "qcow2": partial(qcow2, cached=True),
        "export": export,
        "thin": thin,
    }
    with (
        tempfile.TemporaryDirectory(prefix="export-bench-", dir=args.dir) as base,
        ExitStack() as s,
    ):
        devices = {name: s.enter_context(make(Path(base), size)) for name, make in makers.items()}
        print(f"{'fio --direct=1':20}" + "".join(f"{name:>12}" for name in devices))
        for case in FIO_CASES:
            seen: dict[str, list[float]] = {name: [] for name in devices}
            for _ in range(args.rounds):
                for name, device in devices.items():
                    seen[name].append(fio(device, case, size, args.seconds))
            medians = [statistics.median(values) for values in seen.values()]
            print(f"{case:20}" + "".join(f"{value:12.0f}" for value in medians), flush=True)


if __name__ == "__main__":
    main()
