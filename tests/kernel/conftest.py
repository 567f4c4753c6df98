"""Fixtures of the tests that need the real kernel."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import udevd as support
from tests.uml.boot import SCRATCH


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk: thin_check reads with O_DIRECT, which the guest's tmpfs does not have."""
    if not SCRATCH.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="test-", dir=SCRATCH))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def udevd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """udevd runs, and the programs that the test starts work with it."""
    with support.udevd():
        monkeypatch.delenv("DM_DISABLE_UDEV", raising=False)
        yield
