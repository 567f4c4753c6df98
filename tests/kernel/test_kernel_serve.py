"""The daemon on the kernel's device mapper."""

from pathlib import Path

import grpc
import pytest

from devmapper.linux import mount
from tests.support.command import SMALL
from tests.support.daemon import served
from tests.support.snapshots_client import SnapshotsClient
from tests.support.unix_http import docker_call

pytestmark = pytest.mark.kernel

OPTIONS = (*SMALL, "dm.override_udev_sync_check=true")  # the guest has no udev


def test_killed_and_stopped_amid_mounts(tmp_path):
    with served(
        tmp_path,
        engine="kernel",
        storage_options=OPTIONS,
        docker=True,
        containerd=True,
        metrics=True,
    ) as daemon:
        docker_call(daemon.docker, "GraphDriver.Create", ID="one")
        docker_call(daemon.docker, "GraphDriver.Get", ID="one")
        path = Path(docker_call(daemon.docker, "GraphDriver.Get", ID="one")["Dir"])
        (path / "file").write_text("written")
        with grpc.insecure_channel(f"unix:{daemon.containerd}") as channel:
            device = SnapshotsClient(channel).prepare("active")[0].source
        daemon.kill()
        assert (path / "file").read_text() == "written"
        daemon.start()
        docker_call(daemon.docker, "GraphDriver.Put", ID="one")
        daemon.restart()
        assert (path / "file").read_text() == "written"
        docker_call(daemon.docker, "GraphDriver.Put", ID="one")
        assert not path.exists()
        with grpc.insecure_channel(f"unix:{daemon.containerd}") as channel:
            client = SnapshotsClient(channel)
            assert client.mounts("active")[0].source == device
            client.remove("active")


def test_release_lets_the_kernel_s_pool_go(tmp_path):
    with served(
        tmp_path, engine="kernel", storage_options=OPTIONS, docker=True, on_stop="release"
    ) as daemon:
        docker_call(daemon.docker, "GraphDriver.Create", ID="one")
        path = Path(docker_call(daemon.docker, "GraphDriver.Get", ID="one")["Dir"])
        daemon.stop()
        assert not path.exists()
        assert not [each for each in Path("/dev/mapper").iterdir() if each.name.endswith("-pool")]
        assert not [each for each in mount.mountinfo() if str(tmp_path) in str(each.mount_point)]
