"""What this machine can do, found out by doing it once.

Each probe returns the reason why it cannot, or "" when it can.  Versions are never compared.
"""

import fcntl
import functools
import os
import shutil
from collections.abc import Callable
from typing import Final

LOOP_CTL_GET_FREE: Final = 0x4C82
KERNEL_TESTS: Final = "KERNEL_TESTS"  # environment: "here" where they run without User Mode Linux


def required() -> frozenset[str]:
    """The tiers of which no test may be skipped: `REQUIRE=root,fuse` in the environment."""
    return frozenset(filter(None, os.environ.get("REQUIRE", "").split(",")))


def kernel_tests_run_here() -> bool:
    """Whether this machine's own kernel is meant for the tests with the marker `kernel`."""
    return os.environ.get(KERNEL_TESTS) == "here"


@functools.cache
def root() -> str:
    return "" if os.geteuid() == 0 else "not root"


@functools.cache
def fuse() -> str:
    """FUSE, loop devices and mount together: what the embedded engine's export needs."""
    for node in ("/dev/fuse", "/dev/loop-control"):
        try:
            fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        except OSError as err:
            return f"{node}: {err.strerror}"
        try:
            if node.endswith("control"):
                fcntl.ioctl(fd, LOOP_CTL_GET_FREE)
        except OSError as err:
            return f"no free loop device: {err.strerror}"
        finally:
            os.close(fd)
    for tool in ("mkfs.ext4", "mkfs.xfs"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"{tool} is not installed"
    return ""


@functools.cache
def tools() -> str:
    """The oracle: thin-provisioning-tools."""
    for tool in ("thin_check", "thin_dump", "thin_restore"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"{tool} is not installed (Debian: thin-provisioning-tools)"
    return ""


@functools.cache
def docker() -> str:
    """A dockerd that still has the devicemapper driver, and what it needs to run containers."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    packages = {
        "dockerd": "docker.io",
        "docker": "docker.io",
        "containerd": "containerd",
        "runc": "runc",
        "dmsetup": "dmsetup",
        "busybox": "busybox-static",
    }
    for tool, package in packages.items():
        if shutil.which(tool, path=path) is None:
            return f"{tool} is not installed (Debian: {package})"
    from tests.support import cgroup

    return "" if cgroup.MOUNT else "no cgroup version 2 below /sys/fs/cgroup"


@functools.cache
def go() -> str:
    """Go and the packaged sources that the suites in tests/suites are built from."""
    from tests.support import go_suite

    return next(filter(None, map(go_suite.missing, go_suite.names())), "")


@functools.cache
def qemu() -> str:
    """QEMU: its tools for images, and a machine in software."""
    packages = {
        "qemu-img": "qemu-utils",
        "qemu-io": "qemu-utils",
        "qemu-nbd": "qemu-utils",
        "qemu-system-x86_64": "qemu-system-x86",
    }
    for tool, package in packages.items():
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: {package})"
    return ""


@functools.cache
def prometheus() -> str:
    """Prometheus, and its tool that reads and tests rules."""
    for tool in ("prometheus", "promtool"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: prometheus)"
    return ""


@functools.cache
def uml() -> str:
    """A kernel with dm-thin as a process: User Mode Linux."""
    from tests.uml import boot

    return boot.missing()


@functools.cache
def systemd() -> str:
    """A systemd to run in namespaces, and the hierarchy of control groups that it takes there."""
    if not os.path.exists("/lib/systemd/systemd"):
        return "systemd is not installed (Debian: systemd)"
    if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return "no cgroup version 2 in /sys/fs/cgroup"
    return ""


@functools.cache
def kernel() -> str:
    """The kernel's device mapper with thin-pool: what the kernel engine needs."""
    from devmapper.engine.kernel import requirements

    return requirements.lacking()


PROBES: Final[dict[str, Callable[[], str]]] = {
    "root": root,
    "fuse": fuse,
    "tools": tools,
    "docker": docker,
    "go": go,
    "qemu": qemu,
    "prometheus": prometheus,
    "uml": uml,
    "systemd": systemd,
    "kernel": kernel,
}
