"""What the engine says where something that it needs is missing."""

import os
from pathlib import Path

import pytest

from devmapper.engine.kernel import requirements
from devmapper.engine.kernel.engine import KernelEngine
from devmapper.engine.select import choose_engine
from devmapper.linux import process

pytestmark = pytest.mark.kernel

CONTROL = Path("/dev/mapper/control")
MODPROBE = Path("/proc/sys/kernel/modprobe")


def test_the_kernel_is_chosen_where_it_answers():
    assert isinstance(choose_engine("auto"), KernelEngine)
    assert isinstance(choose_engine("kernel"), KernelEngine)


def test_a_missing_node_is_made():
    number = CONTROL.stat().st_rdev
    CONTROL.rename("/dev/control-elsewhere")
    try:
        assert requirements.lacking() == ""
        assert CONTROL.stat().st_rdev == number
    finally:
        Path("/dev/control-elsewhere").rename(CONTROL)


def test_a_kernel_without_the_target_is_named():
    before = MODPROBE.read_text()
    process.run(["modprobe", "-r", "dm_thin_pool"])
    try:
        MODPROBE.write_text("/bin/false")
        assert requirements.lacking() == (
            "the kernel has no target 'thin-pool' (module dm_thin_pool)"
        )
    finally:
        MODPROBE.write_text(before)
        process.run(["modprobe", "dm_thin_pool"])
    assert requirements.lacking() == ""


def test_the_control_node_is_not_inherited():
    KernelEngine().features()
    inheritable = [
        name
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
        and os.readlink(f"/proc/self/fd/{name}") == str(CONTROL)
        and os.get_inheritable(int(name))
    ]
    assert inheritable == []
