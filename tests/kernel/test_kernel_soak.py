"""The clients' soak with the kernel's device mapper below the daemon."""

import pytest

from tests.support.soak_run import soak


@pytest.mark.kernel
def test_nothing_is_lost_or_leaked(disk, capsys):
    soak(disk, 15, capsys)
