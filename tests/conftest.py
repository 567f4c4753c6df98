"""Which tests run here, what was left out, and that nothing is left behind.

`REQUIRE=root,fuse,tools` turns a tier that this machine lacks into a failure, so that CI cannot go
green by skipping.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import capabilities

_LEFT_OUT: Counter[str] = Counter()
_REQUIRED = frozenset(filter(None, os.environ.get("REQUIRE", "").split(",")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = config.getoption("-m")
    kept, dropped = [], []
    for item in items:
        if item.get_closest_marker("soak") and "soak" not in selected:
            dropped.append(item)
        else:
            kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    for tier, probe in capabilities.PROBES.items():
        if item.get_closest_marker(tier) is None:
            continue
        if reason := probe():
            if tier in _REQUIRED:
                pytest.fail(f"tier {tier!r} is required here: {reason}", pytrace=False)
            _LEFT_OUT[f"{tier}: {reason}"] += 1
            pytest.skip(f"{tier}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEFT_OUT:
        terminalreporter.section("tiers left out on this machine")
        for reason, count in sorted(_LEFT_OUT.items()):
            terminalreporter.line(f"{reason} ({count} tests)")


@pytest.fixture(autouse=True)
def runtime_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep every engine of a test below a folder of its own, short enough for a socket's path."""
    if capabilities.root():
        yield Path("/nonexistent")
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix=f"dmt-{os.getpid()}-", dir="/run") as base:
        before = os.environ.get("DEVMAPPER_RUNTIME_DIR")
        os.environ["DEVMAPPER_RUNTIME_DIR"] = base
        try:
            yield Path(base)
        finally:
            left = _clear_leftovers(Path(base))
            if before is None:
                del os.environ["DEVMAPPER_RUNTIME_DIR"]
            else:
                os.environ["DEVMAPPER_RUNTIME_DIR"] = before
        assert left == [], f"left behind, and cleared now: {left}"


def _clear_leftovers(base: Path) -> list[str]:
    if not os.listdir(base):
        return []
    from tests.support import leftovers

    if left := leftovers.remaining(base):
        leftovers.clear(base)
    return left
