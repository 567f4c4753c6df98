"""A Debian root file system becomes layers, before your eyes (`make demo`).

Every command is printed before it runs, so that you can run it, too.  Whatever happens, nothing is
left behind but the cached root file system.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SUITE: Final = "bookworm"
MIRROR: Final = "http://deb.debian.org/debian"
OPTIONS: Final = "dm.loopdatasize=8G dm.loopmetadatasize=64M dm.basesize=4G"
ENVIRONMENT_LACKING: Final = 3
BIN: Final = Path(sys.executable).parent


class Failed(Exception):
    """A command of the demo has failed; it has said why."""


def say(text: str) -> None:
    print(f"\n\x1b[1m# {text}\x1b[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def run(command: str, **variables: str) -> None:
    """Show a shell command and run it."""
    print(f"$ {command}", flush=True)
    done = subprocess.run(["bash", "-ec", command], env={**os.environ, **variables}, check=False)
    if done.returncode:
        raise Failed(f"exit status {done.returncode}: {command}")


def timed(command: str) -> None:
    """Run it, and say how long it took."""
    start = time.perf_counter()
    run(command)
    print(f"  ({(time.perf_counter() - start) * 1000:.0f} ms, with the start of the command)")


def answer(command: str) -> str:
    """Show a command whose output the demo needs itself."""
    print(f"$ {command}", flush=True)
    done = subprocess.run(["bash", "-ec", command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failed(f"exit status {done.returncode}: {command}")
    print(done.stdout, end="", flush=True)
    return done.stdout.strip()


# The root file system


def configured_mirror() -> str:
    """The Debian mirror that this machine's apt uses."""
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for place in places:
        try:
            lines = place.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            words = [word for word in line.split() if not word.startswith(("[", "signed-by"))]
            if words and words[0] in ("deb", "URIs:"):
                for url in words[1:]:
                    if url.startswith("http") and url.rstrip("/").endswith("/debian"):
                        return url.rstrip("/")
    return MIRROR


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "devmapper"


def root_file_system() -> Path:
    """A Debian as a compressed tar; made once."""
    archive = cache() / f"debian-{SUITE}-minbase.tar.zst"
    if archive.exists():
        print(f"(cached: {archive})")
        return archive
    if shutil.which("debootstrap") is None:
        raise Failed("debootstrap is not installed; apt-get install debootstrap")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="debian-", dir=archive.parent) as directory:
        tree, log = Path(directory) / "root", Path(directory) / "log"
        command = shlex.join(
            ["debootstrap", "--variant=minbase", SUITE, str(tree), configured_mirror()]
        )
        print("(once: a minute or two)")
        try:
            run(f"{command} > {log}")
        except Failed:
            print(log.read_text(errors="replace")[-2000:] if log.exists() else "", file=sys.stderr)
            raise
        shutil.rmtree(tree / "var/cache/apt/archives", ignore_errors=True)
        packed = Path(directory) / archive.name
        run(f"tar -C {tree} --numeric-owner --xattrs -cf - . | zstd -q -o {packed}")
        packed.rename(archive)
    return archive


# The story


def story(root: Path) -> None:
    say("A Debian root file system, from Debian's own packages")
    archive = root_file_system()

    say("It becomes a layer; the graph, its pool and the engine are made for it")
    run(f"time devmapper import debian {archive}")
    run("devmapper info")

    say("Two containers' layers on top of it: snapshots, whatever the size of what they share")
    timed("devmapper create web1 --parent debian")
    timed("devmapper create web2 --parent debian")
    create_with_python(root)

    say("One is mounted, and a command runs in it")
    web1 = answer("devmapper get web1")
    run(f"findmnt -n -o SOURCE,FSTYPE,SIZE,USED -T {web1}")
    run(f"chroot {web1} sh -c '. /etc/os-release; echo \"hello from $PRETTY_NAME\"'")
    run(f"chroot {web1} sh -c 'echo hello > /srv/index.html; echo web1 > /etc/hostname'")
    run(f"chroot {web1} sh -c 'rm /etc/issue; head -c 100M /dev/urandom > /var/cache/big'")

    say("What each layer takes: the 100 MiB are only web1's, the Debian is everybody's")
    run(f"sync -f {web1}; devmapper ls")

    say("A snapshot of the mounted layer is consistent; what is written afterwards is not in it")
    timed("devmapper create backup --parent web1")
    run(f"echo later > {web1}/srv/index.html")
    backup = answer("devmapper get backup")
    run(f"cat {backup}/srv/index.html {web1}/srv/index.html")
    run("devmapper put backup; devmapper put web1")

    say("What web1 has changed, as docker diff shows it, and as a tar")
    run("devmapper changes web1 --parent debian")
    run("devmapper diff web1 --parent debian | tar t")

    say("Removal gives the space back, to the pool and to the disk")
    data = root / "devicemapper" / "data"
    run(f"devmapper pool status | grep Data; du -h {data}")
    run("devmapper rm web1 backup web2 web3")
    run(f"devmapper pool status | grep Data; du -h {data}")
    run("devmapper ls")

    say("The pool is sound, and thin-provisioning-tools agree")
    run("devmapper pool check")
    run("devmapper engine stop")
    if shutil.which("thin_check", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        run(f"thin_check -q {root}/devicemapper/metadata && echo thin_check: no damage")


def create_with_python(root: Path) -> None:
    """The same without the start of a command."""
    from devmapper.driver import init

    print(f">>> driver = devmapper.driver.init({str(root)!r})")
    print(">>> driver.create('web3', 'debian')")
    driver = init(root)
    try:
        start = time.perf_counter()
        driver.create("web3", "debian")
        took = time.perf_counter() - start
    finally:
        driver.close()
    print(f"  ({took * 1000:.1f} ms: that is what making a layer takes)")


@contextmanager
def graph() -> Iterator[Path]:
    """A place for the graph; afterwards no process, mount, loop device or file of it is left."""
    root = Path(tempfile.mkdtemp(prefix="devmapper-demo-", dir="/var/tmp"))
    os.environ["DEVMAPPER_ROOT"] = str(root)
    os.environ["DEVMAPPER_STORAGE_OPT"] = OPTIONS
    os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"
    print(f'$ export PATH="{BIN}:$PATH" DEVMAPPER_ROOT={root}')
    print(f'$ export DEVMAPPER_STORAGE_OPT="{OPTIONS}"')
    try:
        yield root
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the clean-up
        say("Everything is cleaned up")
        if (root / "metadata").is_dir():
            run("devmapper engine stop --force")
        run(f"rm -rf --one-file-system {root}")


def end(number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    if os.geteuid() != 0:
        print(
            "demo: layers are mounted file systems, which only root can make: run it with sudo",
            file=sys.stderr,
        )
        return ENVIRONMENT_LACKING
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        with graph() as root:
            story(root)
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Failed as err:
        print(f"demo: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
