"""The graph driver on the kernel's device mapper."""

import pytest

from devmapper.engine.kernel.engine import KernelEngine
from devmapper.errors import EnvironmentLacking
from tests.conformance.graphdriver_suite import GraphDriverSuite


@pytest.mark.kernel
class TestDriverOnKernelEngine(GraphDriverSuite):
    def make_engine(self) -> KernelEngine:
        return KernelEngine()

    def test_nbd_is_not_needed_here_and_the_error_says_what_to_do(self, driver, tmp_path):
        driver.create("vm")
        with pytest.raises(EnvironmentLacking, match="has a block device") as caught:
            driver.serve_nbd("vm", tmp_path / "socket")
        assert "devmapper activate" in caught.value.hint
        assert not (tmp_path / "socket").exists()
        assert driver.activate("vm").startswith("/dev/mapper/")
        driver.deactivate("vm")
