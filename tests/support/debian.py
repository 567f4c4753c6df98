"""Programs of this machine, or of another suite of Debian, each with that suite's libraries.

A suite's packages are fetched by apt, which checks the archive's signature, and are unpacked, not
installed.  The programs that tests start are told where their libraries are, so that they run as
any other program of this machine: a container's mounts are everybody's, or Docker would not see
what a plugin mounts.  All is kept with what `make demo` keeps; `python -m tests.support.debian`
fetches it, and without the directory the next run fetches anew.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from tools import demo

from devmapper.server.snippets.snippet import Release, parse_release

SUITES: Final = ("trixie", "sid")
_PACKAGES: Final = ("docker.io", "docker-cli", "docker-buildx", "containerd", "runc", "iptables")
_KEYS: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MERGED: Final = ("bin", "lib", "lib64", "sbin")  # links to /usr, which no package here has
_STARTED: Final = (
    "dockerd", "docker", "docker-buildx", "docker-init", "docker-proxy",
    "containerd", "containerd-shim-runc-v2", "ctr", "runc",
)  # fmt: skip
_SECONDS: Final = 600.0


class Programs(NamedTuple):
    """Where the programs are that a rig starts: *root* is a suite's, None this machine's."""

    root: Path | None = None

    def argv(self, program: str, *words: object) -> list[str]:
        """A command of one of them."""
        name = program if self.root is None else str(self.root / "programs" / program)
        return [name, *map(str, words)]

    def environment(self) -> dict[str, str]:
        """For a command: they find each other before those of this machine."""
        path = [os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
        if self.root is not None:
            path.insert(0, str(self.root / "programs"))
        return {**os.environ, "PATH": ":".join(path), "LC_ALL": "C"}

    def release(self, program: str) -> Release:
        """What `PROGRAM --version` says."""
        number = re.search(r"\b\d+\.\d+", self.version(program))
        assert number is not None
        return parse_release(number[0])

    def version(self, program: str) -> str:
        done = subprocess.run(
            self.argv(program, "--version"),
            capture_output=True, text=True, env=self.environment(), timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[0]


HERE: Final = Programs()


def suite(name: str) -> Programs:
    """The programs of one of SUITES, fetched once."""
    root = demo.cache() / f"{name}-containers"
    if not root.exists():
        _fetch(name, root)
    return Programs(root)


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
        _place(tree, root)
        tree.rename(root)


def _place(tree: Path, root: Path) -> None:
    """Copies of the programs, which look for loader and libraries where *tree* will be: *root*."""
    (tree / "programs").mkdir()
    for name in _STARTED:
        places = ("*bin", "libexec/docker/cli-plugins")
        found = next(path for place in places for path in tree.glob(f"usr/{place}/{name}"))
        copy = shutil.copy(found, tree / "programs" / name)
        loader = subprocess.run(
            ["patchelf", "--print-interpreter", copy], capture_output=True, text=True
        ).stdout.strip()
        if loader:  # or it is linked statically
            libraries = root / "usr/lib" / f"{os.uname().machine}-linux-gnu"
            _run(
                "patchelf", "--set-interpreter", f"{root}{loader}",
                "--force-rpath", "--set-rpath", libraries, copy,
            )  # fmt: skip


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
