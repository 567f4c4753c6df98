"""containerd 1.7 and 2.1, with the runc that Debian has beside each, on `devmapper serve`."""

import subprocess

import pytest

from devmapper.server.config import Config
from devmapper.server.snippets import containerd as snippets
from tests.conformance.containerd_suite import IMAGE, LAYERS, ContainerdSuite, assert_same_snapshots
from tests.support import containerd as rig
from tests.support.debian import SUITES, Programs, suite

pytestmark = [
    pytest.mark.root,
    pytest.mark.docker,
    pytest.mark.tools,
    pytest.mark.newer,
    pytest.mark.timeout(300),
]


class TestContainerd17(ContainerdSuite):
    def make_programs(self) -> Programs:
        return suite("trixie")


class TestContainerd21(ContainerdSuite):
    def make_programs(self) -> Programs:
        return suite("sid")

    def test_both_snapshotters_unpack(self, both, tmp_path):
        """The transfer service, which `ctr images import` uses, knows ours and containerd's own."""
        containerd = both.containerd
        rig.write_oci_archive(tmp_path / "image.tar", LAYERS)
        for name in ("overlayfs", rig.SNAPSHOTTER):
            containerd.ctr(
                "images", "import", "--snapshotter", name,
                "--base-name", f"{IMAGE}-{name}", tmp_path / "image.tar",
            )  # fmt: skip
            held = containerd.ctr("snapshots", "--snapshotter", name, "ls").splitlines()[1:]
            assert len(held) == len(LAYERS)
        for name in ("overlayfs", rig.SNAPSHOTTER):
            containerd.ctr("images", "rm", "--sync", f"{IMAGE}-{name}:latest")
        assert_same_snapshots(both)
        assert containerd.snapshots() == {}


@pytest.mark.parametrize("name", SUITES)
def test_what_we_print_is_understood(name, tmp_path):
    """containerd reads `devmapper config containerd` without a complaint, and says the same."""
    programs = suite(name)
    config = Config()
    file = tmp_path / "config.toml"
    file.write_text(snippets.snippet(config, programs.release("containerd")).text)
    done = subprocess.run(
        programs.argv("containerd", "--config", file, "config", "dump"),
        capture_output=True, text=True, env=programs.environment(), timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    dumped = tmp_path / "dumped.toml"
    dumped.write_text(done.stdout)
    assert snippets.proxies_at(dumped, config.containerd_socket) == [snippets.NAME]
    assert snippets.cri_snapshotter(dumped) == snippets.NAME
