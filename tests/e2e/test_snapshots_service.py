"""containerd's Snapshots service under clients that are many, impatient or greedy."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from devmapper.linux import mount
from devmapper.server.containerd.api import snapshots_pb2 as api
from tests.support.daemon import Daemon, served
from tests.support.snapshots_client import SERVICE, SnapshotsClient, connected

OPTIONS = (
    "dm.loopdatasize=256M",
    "dm.loopmetadatasize=16M",
    "dm.basesize=64M",
    "dm.override_udev_sync_check=true",
)
KEYS = 40
CLIENTS = 8
EACH = 10  # requests of a client for one key, all at once

pytestmark = [pytest.mark.root, pytest.mark.tools, pytest.mark.e2e]


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.fuse),
        pytest.param("kernel", marks=pytest.mark.kernel),
    ]
)
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    with served(tmp_path, storage_options=OPTIONS, engine=request.param, containerd=True) as found:
        yield found
        if found.process is not None:
            found.stop()
        checked = found.command.run("check")
        assert checked.status == 0, checked.err


def remove_all(client: SnapshotsClient) -> None:
    while infos := client.infos():
        parents = {info.parent for info in infos}
        for info in infos:
            if info.name not in parents:
                client.remove(info.name)


def commit_base(client: SnapshotsClient) -> None:
    client.prepare("a")
    client.commit("base", "a")


def ask(channel: grpc.Channel, key: str, timeout: float) -> "grpc.Future[bytes]":
    """A View in the background."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/View")
    request = api.ViewSnapshotRequest(key=key, parent="base")
    return call.future(request.SerializeToString(), timeout=timeout)


def code_of(call: "grpc.Future[bytes]") -> grpc.StatusCode:
    error = call.exception()
    if error is None:
        return grpc.StatusCode.OK
    assert isinstance(error, grpc.RpcError)
    return error.code()


def test_thousands_of_requests_at_once(daemon):
    """Of all that ask for the same name one gets it, and the others are told so."""
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(daemon.containerd)) for _ in range(CLIENTS)]
        commit_base(clients[0])
        calls = [
            (f"v{number:02}", ask(client.channel, f"v{number:02}", 120))
            for _ in range(EACH)
            for number in range(KEYS)
            for client in clients
        ]
        codes: dict[str, Counter[grpc.StatusCode]] = {}
        for key, call in calls:
            codes.setdefault(key, Counter())[code_of(call)] += 1
        expected = Counter(
            {grpc.StatusCode.OK: 1, grpc.StatusCode.ALREADY_EXISTS: EACH * CLIENTS - 1}
        )
        assert codes == {f"v{number:02}": expected for number in range(KEYS)}
        assert clients[0].names("kind==view") == sorted(codes)
        remove_all(clients[0])


def test_clients_that_do_not_wait(daemon):
    """What was begun is finished and what was not is not there; either way it can be removed."""
    with connected(daemon.containerd) as client:
        commit_base(client)
        calls = [ask(client.channel, f"v{number}", 0.05) for number in range(KEYS)]
        codes = Counter(map(code_of, calls))
        assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert len(client.infos("kind==view")) >= codes[grpc.StatusCode.OK]
        for info in client.infos("kind==view"):
            (only,) = client.mounts(info.name)
            assert Path(only.source).is_block_device()
    # A connection that is cut amid requests, too
    with connected(daemon.containerd) as client:
        for number in range(KEYS):
            ask(client.channel, f"cut{number}", 60)
    daemon.restart()
    with connected(daemon.containerd) as client:
        remove_all(client)
        assert client.infos() == []


def fill(client: SnapshotsClient, key: str, point: Path) -> None:
    """A snapshot with a file of 40 MiB."""
    (only,) = client.prepare(key, "base")
    point.mkdir()
    mount.mount(Path(only.source), point, only.type)
    try:
        (point / "content").write_bytes(bytes(range(256)) * (40 << 12))
    finally:
        mount.unmount(point)  # it flushes


def test_a_pool_that_runs_full(daemon, tmp_path):
    """There is a reserve (dm.min_free_space): nothing is made in it, and removing still works."""
    with connected(daemon.containerd) as client:
        commit_base(client)
        keys = [f"big{number}" for number in range(6)]
        for key in keys:
            fill(client, key, tmp_path / key)
        with pytest.raises(grpc.RpcError) as raised:
            client.prepare("one-too-many", "base")
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "pool is out of data space" in (raised.value.details() or "")
        assert client.names("kind==active") == keys
        client.remove(keys[0])
        client.prepare("again", "base")
        remove_all(client)
