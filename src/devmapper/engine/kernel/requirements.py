"""What the kernel engine needs of the machine, found out by asking for it once."""

from devmapper.engine.kernel.targets import POOL
from devmapper.linux import libdm
from devmapper.linux.libdm import TaskKind


def lacking() -> str:
    """The first thing that is missing and what to do about it; empty if nothing is."""
    try:
        with libdm.task(TaskKind.VERSION) as task:
            task.run()
    except OSError as err:
        return f"{err.filename}: {err.strerror}"
    try:
        # Has the kernel load the module, too
        with libdm.task(TaskKind.TARGET_VERSION, POOL) as task:
            task.run()
            has = POOL in task.target_versions()
    except OSError:
        has = _is_listed()  # before Linux 4.19 nothing but the list
    return "" if has else f"the kernel has no target {POOL} (module dm_thin_pool)"


def _is_listed() -> bool:
    with libdm.task(TaskKind.LIST_VERSIONS) as task:
        task.run()
        return POOL in task.target_versions()
