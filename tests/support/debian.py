"""Programs of this machine, or of another suite of Debian, with that suite's /usr and /etc.

A suite's packages are fetched by apt, which checks the archive's signature, and are unpacked, not
installed.  They are kept with what `make demo` keeps: `python -m tests.support.debian` fetches
both, and removing the directory makes the next run fetch anew.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tools import demo

from devmapper.linux import mount
from devmapper.server.snippets.snippet import Release, parse_release

SUITES: Final = ("trixie", "sid")
_PACKAGES: Final = ("docker.io", "docker-cli", "docker-buildx", "containerd", "runc", "iptables")
_KEYS: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MERGED: Final = ("bin", "lib", "lib64", "sbin")  # links to /usr, which no package here has
_INSIDE: Final = Path(__file__).with_name("debian_inside.py")
_MS_SHARED: Final = 1 << 20  # linux/mount.h
_SECONDS: Final = 600.0


class Programs(NamedTuple):
    """Where the programs are that a rig starts: *root* is a suite's, None this machine's."""

    root: Path | None = None

    def argv(self, *words: object) -> list[str]:
        """A command, which keeps its process id; what it mounts stays its own, but in `shared`."""
        own = [] if self.root is None else inside(self.root)
        return [*own, *map(str, words)]

    def release(self, program: str) -> Release:
        """What `PROGRAM --version` says."""
        number = re.search(r"\b\d+\.\d+", self.version(program))
        assert number is not None
        return parse_release(number[0])

    def version(self, program: str) -> str:
        done = subprocess.run(
            self.argv(program, "--version"),
            capture_output=True, text=True, env=environment(), timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[0]

    @contextmanager
    def shared(self, *folders: Path) -> Iterator[None]:
        """What is mounted below *folders* is seen by these programs and by others for the duration.

        As it is where all see the same mounts; so there nothing has to be done.
        """
        with ExitStack() as stack:
            for folder in folders if self.root else ():
                mount.mount(folder, folder, None, flags=mount.MountFlag.BIND)
                stack.callback(mount.unmount, folder, flags=mount.UmountFlag.DETACH)
                mount.mount("none", folder, None, flags=_MS_SHARED)
            yield


HERE: Final = Programs()


def inside(root: Path) -> list[str]:
    """The words before a command that is to see the /usr and /etc of *root* in place of ours."""
    return [
        "unshare", "--mount", "--propagation", "unchanged",
        sys.executable, "-I", str(_INSIDE), str(root),
    ]  # fmt: skip


def suite(name: str) -> Programs:
    """The programs of one of SUITES, fetched once."""
    root = demo.cache() / f"{name}-containers"
    if not root.exists():
        _fetch(name, root)
    return Programs(root)


def environment() -> dict[str, str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return {**os.environ, "PATH": path, "LC_ALL": "C"}


def _fetch(name: str, root: Path) -> None:
    """Let apt work out, fetch and verify the packages, on an empty system of its own."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=root.parent) as directory:
        work = Path(directory)
        for folder in ("lists/partial", "archives/partial"):
            (work / folder).mkdir(parents=True)
        (work / "status").touch()
        (work / "sources.list").write_text(
            f"deb [signed-by={_KEYS}] {demo.configured_mirror()} {name} main\n"
        )
        apt = [
            "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none",
            "-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::State::status={work}/status",
            "-o", f"Dir::Etc::sourcelist={work}/sources.list", "-o", "Dir::Etc::sourceparts=-",
            "-o", f"Dir::Cache::archives={work}/archives",
        ]  # fmt: skip
        _run(*apt, "update")
        _run(*apt, "install", "--yes", "--no-install-recommends", "--download-only", *_PACKAGES)
        tree = work / "root"
        for folder in _MERGED:
            (tree / "usr" / folder).mkdir(parents=True)
            (tree / folder).symlink_to(f"usr/{folder}")
        for package in sorted((work / "archives").glob("*.deb")):
            _run("dpkg-deb", "--extract", package, tree)
        for part in ("doc", "man", "locale"):
            shutil.rmtree(tree / "usr/share" / part, ignore_errors=True)
        tree.rename(root)


def _run(*argv: object) -> None:
    done = subprocess.run(
        [str(word) for word in argv],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise demo.Failed(f"{argv[0]}: {done.stderr}")


def main() -> None:
    for name in SUITES:
        programs = suite(name)
        for program in ("dockerd", "docker", "containerd", "runc"):
            print(f"{name}: {programs.version(program)}")


if __name__ == "__main__":
    main()
