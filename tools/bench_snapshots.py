"""How a daemon does with ten thousand snapshots: `make bench-snapshots`.

Serves a graph to containerd, makes COUNT committed snapshots side by side over gRPC, and prints
what making them took, and then List, Stat, memory and a restart.  It asserts nothing.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.daemon import Daemon, served
from tests.support.snapshots_client import SnapshotsClient, connected

OPTIONS = (
    "dm.basesize=64M",
    "dm.loopdatasize=20G",
    "dm.loopmetadatasize=1G",
    "dm.override_udev_sync_check=true",
)
ROUNDS = 9
MIB = 1024**2


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def median(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    return statistics.median(timed(call) for _ in range(ROUNDS)) * 1000


def make(daemon: Daemon, count: int, clients: int) -> None:
    """Snapshots of one parent, each written to by nobody, committed at once."""
    with connected(daemon.containerd) as client:
        client.prepare("key")
        client.commit("parent", "key")

        def one(number: int) -> None:
            labels = {"containerd.io/gc.root": f"number {number}"}
            client.prepare(f"key-{number}", "parent", labels)
            client.commit(f"snapshot-{number:05}", f"key-{number}", labels)

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(one, range(count)))


def show(daemon: Daemon, count: int) -> None:
    with connected(daemon.containerd) as client:
        look_at(client, daemon, count)


def look_at(client: SnapshotsClient, daemon: Daemon, count: int) -> None:
    found = len(client.infos())
    print(f"snapshots listed: {found}")
    print(f"List: {median(client.infos):.0f} ms")
    print(f"List with a filter for one: {median(lambda: client.infos('name==parent')):.0f} ms")
    print(f"Stat: {median(lambda: client.stat(f'snapshot-{count - 1:05}')):.2f} ms")
    print(f"memory after these: {daemon.rss() / MIB:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="auto", choices=("auto", "kernel", "embedded"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--directory", type=Path, help="where to work; /var/tmp by default")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.directory or "/var/tmp") as directory:
        measure(Path(directory), words.engine, words.count, words.clients)


def measure(directory: Path, engine: str, count: int, clients: int) -> None:
    every = {"docker": True, "containerd": True, "metrics": True}
    with served(
        directory,
        storage_options=OPTIONS,
        engine=engine,
        check_log=False,
        **every,  # type: ignore[arg-type]
    ) as daemon:
        time.sleep(1)
        print(f"memory, idle, no snapshots: {daemon.rss() / MIB:.1f} MiB")
        took = timed(lambda: make(daemon, count, clients))
        print(
            f"prepare + commit of {count} by {clients} clients: {took:.1f} s,"
            f" {took / count * 1000:.2f} ms each"
        )
        print(f"memory after making them: {daemon.rss() / MIB:.1f} MiB")
        show(daemon, count)
        daemon.stop()
        print(f"start with {count} snapshots: {timed(daemon.start) * 1000:.0f} ms until ready")
        time.sleep(1)
        print(f"memory, idle, {count} snapshots: {daemon.rss() / MIB:.1f} MiB")
        show(daemon, count)
        daemon.kill()
        print(f"start after a SIGKILL: {timed(daemon.start) * 1000:.0f} ms until ready")


if __name__ == "__main__":
    main()
