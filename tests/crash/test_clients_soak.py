"""Docker's and containerd's clients on one pool, while the daemon is killed every few seconds."""

import pytest

from tests.support.soak_run import soak


@pytest.mark.root
@pytest.mark.fuse
@pytest.mark.tools
def test_nothing_is_lost_or_leaked(tmp_path, capsys):
    soak(tmp_path, 20, capsys)
