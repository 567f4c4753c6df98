"""Debian's dockerd 20.10 on our plugin, on both engines."""

import pytest

from tests.conformance.dockerd_plugin_suite import DockerdPluginSuite

pytestmark = [
    pytest.mark.root,
    pytest.mark.docker,
    pytest.mark.tools,
    pytest.mark.e2e,
    pytest.mark.timeout(300),
]


class TestDockerdPlugin(DockerdPluginSuite):
    pass
