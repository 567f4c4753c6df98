"""An engine process for tests that treat it badly."""

import pytest

from tests.support.engine_rig import POOL, Rig
from tests.support.leftovers import assert_nothing_left


@pytest.fixture
def rig(tmp_path, runtime_base):
    rig = Rig(tmp_path)
    yield rig
    rig.engine.deactivate_pool(POOL)
    rig.check()
    assert_nothing_left(runtime_base)
