"""Which tests run here, what was left out, and that nothing is left behind.

`REQUIRE=root,fuse,tools` turns a tier that this machine lacks into a failure, so that CI cannot go
green by skipping.
"""

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import capabilities
from tests.uml.plugin import KernelTier

_OWN_TARGETS = ("soak", "newer")  # not for every run: each has a target of its own
_LEFT_OUT: Counter[str] = Counter()
_REQUIRED = capabilities.required()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(KernelTier(config))
    # A shell ignores it for what it runs in the background, and commands under test inherit that
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = config.getoption("-m")
    kept, dropped = [], []
    for item in items:
        if any(item.get_closest_marker(name) and name not in selected for name in _OWN_TARGETS):
            dropped.append(item)
        else:
            kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    lacking = {
        tier: reason
        for tier, probe in capabilities.PROBES.items()
        if item.get_closest_marker(tier) is not None and (reason := probe())
    }
    if not lacking:
        return
    words = "; ".join(f"{tier}: {reason}" for tier, reason in lacking.items())
    if _REQUIRED & lacking.keys():
        pytest.fail(f"required here, but lacking: {words}", pytrace=False)
    _LEFT_OUT.update(f"{tier}: {reason}" for tier, reason in lacking.items())
    pytest.skip(words)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEFT_OUT:
        terminalreporter.section("tiers left out on this machine")
        for reason, count in sorted(_LEFT_OUT.items()):
            terminalreporter.line(f"{reason} ({count} tests)")


@pytest.fixture(autouse=True)
def nothing_left_in_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that has the machine's device mapper for itself leaves nothing in the kernel."""
    if request.node.get_closest_marker("kernel") is None:
        yield
        return
    from tests.support import kernel_state

    before = kernel_state.held()
    yield
    left = kernel_state.left_since(before)
    kernel_state.take_away(left)
    assert left == [], f"left behind: {', '.join(map(str, left))}"


@pytest.fixture(autouse=True)
def runtime_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Keep every engine of a test below a folder of its own, and demand that nothing stays there.

    In /run, because a socket's path is short.
    """
    if capabilities.root():
        yield Path("/nonexistent")
        return
    base = Path(tempfile.mkdtemp(prefix=f"dmt-{os.getpid()}-", dir="/run"))
    monkeypatch.setenv("DEVMAPPER_RUNTIME_DIR", str(base))
    yield base
    left = []
    if any(base.iterdir()):
        from tests.support import leftovers

        left = leftovers.remaining(base)
        leftovers.clear(base)
        shutil.rmtree(base)
    else:
        base.rmdir()
    left += _unmount_below(tmp_path_factory.getbasetemp())
    assert left == [], f"left behind: {left}"


def _unmount_below(folder: Path) -> list[str]:
    """Unmount what a test has left mounted below *folder*, last mount first; say what it was."""
    from devmapper.linux import mount

    found = [
        entry.mount_point
        for entry in mount.mountinfo()
        if str(entry.mount_point).startswith(f"{folder}/")
    ]
    for point in reversed(found):
        mount.unmount(point, flags=mount.UmountFlag.DETACH)
    return [f"mount at {point}" for point in found]
