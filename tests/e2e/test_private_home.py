"""The private home where something is mounted below it already."""

from contextlib import nullcontext

import pytest

from devmapper.deviceset.home import PrivateHome, is_bound_onto_itself
from devmapper.linux import mount

pytestmark = [pytest.mark.root, pytest.mark.e2e]


def test_what_is_mounted_below_the_home_is_not_hidden(tmp_path):
    """A dockerd that was killed leaves layers mounted in a home that it did not bind."""
    home = tmp_path / "home"
    layer = home / "mnt" / "layer"
    layer.mkdir(parents=True)
    private = PrivateHome(home, nullcontext)
    with mount.mounted_at("tmpfs", layer, "tmpfs"):
        (layer / "file").touch()
        private.pin()
        assert (layer / "file").exists()
        assert not mount.is_mount_point(home)
        private.release()
    private.pin()
    assert is_bound_onto_itself(home)
    private.release()
    assert not mount.is_mount_point(home)
