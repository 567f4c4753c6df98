"""A machine in software: QEMU, Debian's own kernel, and a disk that somebody else has made.

The kernel's package is unpacked, not installed, and kept with the root file system in the cache of
`make demo`.  Its initial file system is busybox and the modules for a virtio disk with ext4; it
mounts /dev/vda and starts the shell that it finds there, on the serial console.
"""

import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from tools import demo

from tests.support import capabilities

_MODULES: Final = ("virtio_pci", "virtio_blk", "crc32c_generic", "libcrc32c", "ext4")
_PROMPT: Final = re.compile(rb"root@[^\n]*:[^\n]*# $")
_ESCAPES: Final = re.compile(rb"\x1b\[[?0-9;]*[a-zA-Z]")
_BOOT_SECONDS: Final = 90.0
_END_SECONDS: Final = 60.0
_MEMORY: Final = "192M"


_UNFETCHED: Final = (demo.Failed, subprocess.CalledProcessError)


class Kernel(NamedTuple):
    """What a machine boots."""

    image: Path
    initramfs: Path


class Lost(Exception):
    """The machine did not say what was expected of it."""


def debian_root() -> Path:
    """A Debian as a compressed tar, made by debootstrap once."""
    with fetched():
        return demo.root_file_system()


def kernel() -> Kernel:
    """Debian's kernel and its initial file system, fetched once."""
    package = demo.cache() / "linux-image-amd64"
    if not package.exists():
        with fetched():
            _fetch(package)
    (image,) = package.glob("boot/vmlinuz-*")
    initramfs = package / "initramfs"
    if not initramfs.exists():
        partial = package / f"initramfs.{os.getpid()}"
        partial.write_bytes(_initramfs(package))
        partial.rename(initramfs)
    return Kernel(image, initramfs)


@contextmanager
def fetched() -> Iterator[None]:
    """Without a network there is no machine: skipped, unless QEMU's tests are required."""
    try:
        yield
    except _UNFETCHED as err:
        if "qemu" in capabilities.required():
            raise
        pytest.skip(f"Debian's packages cannot be fetched: {err}")


def _fetch(package: Path) -> None:
    depends = _run("apt-cache", "depends", "--important", "linux-image-amd64")
    (name,) = re.findall(r"Depends: (linux-image-\S+)", depends)[:1]
    package.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kernel-", dir=package.parent) as folder:
        _run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name, cwd=folder)
        (archive,) = Path(folder).glob("*.deb")
        tree = Path(folder) / "tree"
        tree.mkdir()
        # Most of the package's 400 MB are drivers that no machine here has
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE
        ) as unpacked:
            subprocess.run(
                ["tar", "-x", "-C", tree, "--wildcards", "./boot/vmlinuz-*",
                 *(f"./lib/modules/*/kernel/{part}" for part in
                   ("drivers/virtio", "drivers/block", "crypto", "lib", "fs"))],
                stdin=unpacked.stdout, check=True,
            )  # fmt: skip
        tree.rename(package)


def _initramfs(package: Path) -> bytes:
    files = {path.stem.replace("-", "_"): path for path in package.rglob("*.ko")}
    order: list[str] = []
    for name in _MODULES:
        _add_module(name, files, order)
    lines = ["#!/bin/busybox sh", "b=/bin/busybox"]
    lines += [f"$b mount -t {kind} {kind} /{at}" for kind, at in _SYSTEM]
    lines += [f"$b insmod /modules/{name}.ko" for name in order]
    lines += [
        "until [ -b /dev/vda ]; do $b sleep 0.05; done",
        "$b mount -t ext4 /dev/vda /root",
        *(f"$b mount --move /{at} /root/{at}" for _, at in _SYSTEM),
        "exec $b switch_root /root /bin/bash",
    ]
    archive = _Cpio()
    for folder in ("bin", "dev", "proc", "sys", "root", "modules"):
        archive.add(folder, 0o40755)
    archive.add("dev/console", 0o20600, device=(5, 1))
    archive.add("bin/busybox", 0o100755, Path("/bin/busybox").read_bytes())
    for name in order:
        archive.add(f"modules/{name}.ko", 0o100644, files[name].read_bytes())
    archive.add("init", 0o100755, "\n".join([*lines, ""]).encode())
    return archive.end()


_SYSTEM: Final = (("devtmpfs", "dev"), ("proc", "proc"), ("sysfs", "sys"))


def _add_module(name: str, files: dict[str, Path], order: list[str]) -> None:
    """What a module depends on comes before it."""
    if name in order:
        return
    for other in _run("/sbin/modinfo", "-F", "depends", files[name]).strip().split(","):
        if other:
            _add_module(other.replace("-", "_"), files, order)
    order.append(name)


class _Cpio:
    """An archive as the kernel unpacks it (`buffer-format.rst`, newc)."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._count = 0

    def add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._count += 1
        path = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self._raw += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        self._pad()
        self._raw += data
        self._pad()

    def end(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._raw)

    def _pad(self) -> None:
        self._raw += bytes(-len(self._raw) % 4)


class Machine:
    """A running machine with one disk; obtained from `booted`."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = child
        self.heard = b""  # all of the console

    @property
    def pid(self) -> int:
        return self._child.pid

    def run(self, command: str) -> str:
        """Run a command in the machine's shell; its output, without the prompt that follows."""
        begin = len(self.heard)
        self._type(command)
        self.wait_for_prompt(begin)
        text = _ESCAPES.sub(b"", self.heard[begin:]).replace(b"\r", b"").decode()
        return text.partition("\n")[2].rpartition("\n")[0]

    def wait_for_prompt(self, begin: int, seconds: float = _BOOT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not _PROMPT.search(_ESCAPES.sub(b"", self.heard[begin:])):
            self._hear(deadline)

    def power_off(self) -> None:
        """As an administrator without an init system does it; the machine has ended then."""
        self._type("mount -o remount,ro / && echo o > /proc/sysrq-trigger")
        assert self._child.stdin is not None
        deadline = time.monotonic() + _END_SECONDS
        try:
            while self._child.poll() is None:
                self._hear(deadline)
        except Lost:
            if self._child.wait(_END_SECONDS) != 0:
                raise
        assert self._child.wait() == 0

    def _type(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line.encode() + b"\n")
        self._child.stdin.flush()

    def _hear(self, deadline: float) -> None:
        assert self._child.stdout is not None
        left = deadline - time.monotonic()
        fd = self._child.stdout.fileno()
        readable, _, _ = select.select([fd], [], [], max(0.0, left))
        piece = os.read(fd, 65536) if readable else b""
        if not piece:
            raise Lost(self.heard.decode(errors="replace")[-3000:])
        self.heard += piece


@contextmanager
def booted(disk: str, kernel: Kernel) -> Iterator[Machine]:
    """A machine whose root file system is *disk*, a block device or a URI; killed afterwards.

    It has no network and needs no KVM.  Several start at once: `wait_for_prompt(0)` is the
    caller's.
    """
    argv = [
        "qemu-system-x86_64", "-accel", "tcg", "-m", _MEMORY, "-nic", "none", "-display", "none",
        "-monitor", "none", "-serial", "stdio", "-no-reboot",
        "-kernel", str(kernel.image), "-initrd", str(kernel.initramfs),
        "-append", "console=ttyS0 quiet panic=-1",
        "-drive", f"file={disk},format=raw,if=virtio,discard=unmap",
    ]  # fmt: skip
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        try:
            yield Machine(child)
        finally:
            child.kill()


def _run(*argv: object, cwd: str | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in argv], stdout=subprocess.PIPE, text=True, check=True, cwd=cwd
    )
    return done.stdout


def main() -> None:
    """Fetch what machines boot, where such tests run; they say themselves what is missing."""
    if capabilities.root() or capabilities.qemu():
        return
    try:
        demo.root_file_system()
        kernel()
    except _UNFETCHED as err:
        print(f"not fetched: {err}")


if __name__ == "__main__":
    main()
