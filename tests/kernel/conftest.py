"""Fixtures of the tests that need the real kernel."""

from collections.abc import Iterator

import pytest

from tests.support import udevd as support


@pytest.fixture
def udevd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """udevd runs, and the programs that the test starts work with it."""
    with support.udevd():
        monkeypatch.delenv("DM_DISABLE_UDEV", raising=False)
        yield
