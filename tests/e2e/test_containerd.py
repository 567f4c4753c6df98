"""Debian's containerd 1.6 and runc on `devmapper serve`, on both engines."""

import pytest

from tests.conformance.containerd_suite import ContainerdSuite

pytestmark = [
    pytest.mark.root,
    pytest.mark.docker,
    pytest.mark.tools,
    pytest.mark.e2e,
    pytest.mark.timeout(300),
]


class TestContainerd(ContainerdSuite):
    pass
