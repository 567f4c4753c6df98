"""Docker 26.1, the last in Debian that has plugins for storage, on ours."""

import pytest

from tests.conformance.dockerd_plugin_suite import (
    DOCKERFILE,
    RUN,
    DockerdPluginSuite,
    import_first,
)
from tests.support import export_tree
from tests.support.debian import Programs, suite
from tests.support.docker_plugin import layers_of, mounted_layers
from tests.support.dockerd import busybox_tar

pytestmark = [
    pytest.mark.root,
    pytest.mark.docker,
    pytest.mark.tools,
    pytest.mark.newer,
    pytest.mark.timeout(300),
]


class TestDockerd26(DockerdPluginSuite):
    def make_programs(self) -> Programs:
        return suite("trixie")

    def tree_of(self, docker, name, folder):
        """Without `docker export`, see below."""
        status, packed = docker.request("GET", f"/containers/{name}/archive?path=/.")
        assert status == 200
        (folder / name).write_bytes(packed)
        return export_tree.of_tar(folder / name)

    def test_build_with_buildkit(self, both, tmp_path):
        docker = both.docker
        docker.start()
        (tmp_path / "Dockerfile").write_bytes(DOCKERFILE)
        (tmp_path / "root.tar").write_bytes(busybox_tar({"gone": b"soon"}))
        (tmp_path / "extra").write_text("extra\n")
        context = str(tmp_path)
        docker.docker("build", "--network=none", "--tag=built", context, buildkit=True)
        assert docker.docker(*RUN, "--rm", "built") == "built\nextra"
        docker.docker("builder", "prune", "--all", "--force")
        self.assert_all_gone(both)

    def test_exported_containers_stay_mounted(self, both, tmp_path):
        """With its own drivers, too (moby issue 48516); its end at least unmounts them."""
        docker = both.docker
        docker.start()
        import_first(both)
        docker.docker("create", "--name=c1", "first", "cat")
        layer = docker.layer_of("c1")
        docker.export("c1", tmp_path / "c1.tar")
        assert mounted_layers(both.daemon.home) == {layer}
        docker.docker("rm", "c1")
        assert mounted_layers(both.daemon.home) == {layer}
        docker.stop()
        assert mounted_layers(both.daemon.home) == set()
        assert layer in layers_of(both)  # as Docker's own drivers keep its directory
