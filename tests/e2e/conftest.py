"""Clients of the daemon that a module's fixture `daemon` has started."""

from collections.abc import Iterator

import pytest

from tests.support.daemon import Daemon
from tests.support.layers_client import PluginClient
from tests.support.snapshots_client import SnapshotsClient, connected


@pytest.fixture
def docker(daemon: Daemon) -> Iterator[PluginClient]:
    client = PluginClient(daemon.docker)
    yield client
    client.close()


@pytest.fixture
def containerd(daemon: Daemon) -> Iterator[SnapshotsClient]:
    with connected(daemon.containerd) as client:
        yield client
