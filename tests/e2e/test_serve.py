"""The daemon as a real process: it starts, ends, dies, and starts again."""

import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from devmapper.engine.embedded import runtime
from devmapper.engine.runtime import runtime_base
from devmapper.linux import mount
from devmapper.server.lock import control_socket, serving
from tests.support import leftovers
from tests.support.command import PROGRAM, SMALL
from tests.support.daemon import Daemon, served
from tests.support.snapshots_client import SnapshotsClient
from tests.support.unix_http import UnixConnection, docker_call
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

MIB = 1 << 20
FRONT_ENDS: dict[str, Any] = {"docker": True, "containerd": True, "metrics": True}


def docker(daemon: Daemon, endpoint: str, **members: str) -> str:
    """A call that has to succeed; the directory, where it gives one."""
    reply = docker_call(daemon.docker, f"GraphDriver.{endpoint}", **members)
    assert not reply.get("Err"), reply
    return str(reply.get("Dir", ""))


def _get(path: Path, url: str) -> bytes:
    connection = UnixConnection(path)
    try:
        connection.request("GET", url)
        return connection.getresponse().read()
    finally:
        connection.close()


def engine_process(daemon: Daemon) -> int:
    (pool,) = [each for each in leftovers.pools_of(runtime_base()) if each.pid.exists()]
    identity = runtime.read_pid(pool)
    assert identity is not None
    assert identity.alive()
    return identity.pid


def run(argv: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


# Start and end


def test_starts_says_so_and_ends_when_told(tmp_path):
    with served(tmp_path, **FRONT_ENDS) as daemon:
        assert any(line.startswith("STATUS=serving graph") for line in daemon.notified)
        assert serving(daemon.home) == daemon.control
        for path in (daemon.docker, daemon.containerd):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert docker_call(daemon.docker, "Plugin.Activate") == {"Implements": ["GraphDriver"]}
        with grpc.insecure_channel(f"unix:{daemon.containerd}") as channel:
            with pytest.raises(grpc.RpcError) as raised:
                SnapshotsClient(channel).stat("nothing")
            assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        assert b"devmapper_pool_up 1.0" in _get(daemon.metrics, "/metrics")
        daemon.signal(signal.SIGHUP)
        time.sleep(0.2)
        assert docker_call(daemon.docker, "Plugin.Activate")
        daemon.signal(signal.SIGTERM)
        daemon.await_notice("STOPPING=1", 20)
        assert daemon.wait() == 0
        assert sorted(path.name for path in daemon.sockets.iterdir()) == [
            "config.toml", "log", "notify",
        ]  # fmt: skip
        assert serving(daemon.home) is None
        daemon.start()
        daemon.signal(signal.SIGINT)
        assert daemon.wait() == 0


def test_told_to_end_while_it_starts(tmp_path):
    for pause in (0.2, 0.5, 1.0):
        with served(tmp_path) as daemon:
            daemon.stop()
            process = subprocess.Popen(daemon.argv(), stderr=subprocess.PIPE, text=True)
            time.sleep(pause)
            process.terminate()
            _, told = process.communicate(timeout=60)
            # Before it is ours, Python ends by the signal itself
            assert process.returncode in (0, 143, -signal.SIGTERM), told
            assert "Traceback" not in told
            assert not daemon.control.exists()


def test_a_second_daemon_is_refused_and_names_the_first(tmp_path):
    with served(tmp_path) as daemon:
        done = run(daemon.argv())
        assert done.returncode == 4
        assert f"is in use by process {daemon.pid} (" in done.stderr
        assert len(done.stderr.splitlines()) == 2
        assert serving(daemon.home) == daemon.control


def test_the_engine_is_no_part_of_the_daemon_and_outlives_it(tmp_path):
    with served(tmp_path, engine="embedded") as daemon:
        engine = engine_process(daemon)
        assert os.getsid(engine) == engine
        assert os.getsid(engine) != os.getsid(daemon.pid)
        daemon.stop()
        assert engine_process(daemon) == engine
        daemon.start()
        daemon.kill()
        assert engine_process(daemon) == engine
        environment = Path(f"/proc/{engine}/environ").read_bytes().split(b"\0")
        assert not [each for each in environment if each.startswith(b"NOTIFY_SOCKET=")]
        status = Path(f"/proc/{engine}/status").read_text()
        ignored = int(status.split("SigIgn:\t")[1].split()[0], 16)
        assert not ignored & (1 << signal.SIGTERM - 1)


def test_release_lets_go_of_everything(tmp_path):
    with served(tmp_path, docker=True, on_stop="release") as daemon:
        docker(daemon, "Create", ID="one")
        path = Path(docker(daemon, "Get", ID="one"))
        (path / "kept").write_text("1")
        daemon.stop()
        assert not path.exists()
        assert not [pool for pool in leftovers.pools_of(runtime_base()) if pool.socket.exists()]
        daemon.start()
        assert (Path(docker(daemon, "Get", ID="one")) / "kept").read_text() == "1"
        docker(daemon, "Put", ID="one")


def test_release_names_who_keeps_it_from_that(tmp_path):
    with served(tmp_path, docker=True, on_stop="release", check_log=False) as daemon:
        docker(daemon, "Create", ID="one")
        path = Path(docker(daemon, "Get", ID="one"))
        with open(path / "file", "w"):
            daemon.signal()
            assert daemon.wait() == 12
        last = daemon.log.read_text().splitlines()[-2:]
        assert last[0].startswith("devmapper: layer ")
        assert str(os.getpid()) in last[0]
        assert not daemon.docker.exists()


# What runs when the end comes


def test_a_request_under_way_is_finished(tmp_path):
    body = _tar_of(b"x" * (4 * MIB))
    with served(tmp_path, docker=True, stop_time="60s") as daemon:
        docker(daemon, "Create", ID="one")
        client = UnixConnection(daemon.docker)
        _begin_apply(client, body[:MIB], len(body))
        daemon.signal()
        daemon.await_notice("STOPPING=1", 20)
        time.sleep(0.3)
        assert daemon.process is not None
        assert daemon.process.poll() is None
        client.send(body[MIB:])
        reply = client.getresponse().read()
        assert b'"Size":4194304' in reply.replace(b" ", b"")
        client.close()
        assert daemon.wait() == 0
        daemon.start()
        path = Path(docker(daemon, "Get", ID="one"))
        assert (path / "big").stat().st_size == 4 * MIB
        docker(daemon, "Put", ID="one")


def test_a_second_signal_does_not_wait(tmp_path):
    body = _tar_of(b"x" * MIB)
    with served(tmp_path, docker=True, stop_time="1h", check_log=False) as daemon:
        docker(daemon, "Create", ID="one")
        client = UnixConnection(daemon.docker)
        _begin_apply(client, body[:1000], len(body))
        daemon.signal()
        daemon.await_notice("STOPPING=1", 20)
        time.sleep(0.3)
        daemon.signal()
        assert daemon.wait(30) == 0
        assert "told to end again" in daemon.log.read_text()
        client.close()
        daemon.start()  # and nothing is half-made
        docker(daemon, "Remove", ID="one")
        assert daemon.command("check").status == 0


def test_requests_that_do_not_end_are_broken_off(tmp_path):
    body = _tar_of(b"x" * MIB)
    with served(tmp_path, docker=True, stop_time="500ms", check_log=False) as daemon:
        docker(daemon, "Create", ID="one")
        client = UnixConnection(daemon.docker)
        _begin_apply(client, body[:1000], len(body))
        daemon.signal()
        assert daemon.wait(60) == 0
        client.close()
        daemon.start()
        docker(daemon, "Remove", ID="one")


def _tar_of(content: bytes) -> bytes:
    import io
    import tarfile

    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        info = tarfile.TarInfo("big")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def _begin_apply(client: UnixConnection, piece: bytes, total: int) -> None:
    client.putrequest("POST", "/GraphDriver.ApplyDiff?id=one&parent=")
    client.putheader("Content-Length", str(total))
    client.endheaders()
    client.send(piece)
    time.sleep(0.5)  # until it is under way


# Killed and started again


def test_killed_while_a_layer_is_mounted_it_goes_on_where_it_was(tmp_path):
    with served(tmp_path, **FRONT_ENDS) as daemon:
        docker(daemon, "Create", ID="one")
        path = Path(docker(daemon, "Get", ID="one"))
        docker(daemon, "Get", ID="one")
        (path / "file").write_text("written")
        with grpc.insecure_channel(f"unix:{daemon.containerd}") as channel:
            device = SnapshotsClient(channel).prepare("active")[0].source
        daemon.kill()
        assert daemon.docker.exists()  # stale
        assert (path / "file").read_text() == "written"
        daemon.start()
        assert (path / "file").read_text() == "written"
        docker(daemon, "Put", ID="one")
        assert (path / "file").exists()
        docker(daemon, "Put", ID="one")
        assert not path.exists()
        with grpc.insecure_channel(f"unix:{daemon.containerd}") as channel:
            client = SnapshotsClient(channel)
            assert client.mounts("active")[0].source == device
            client.remove("active")
        docker(daemon, "Remove", ID="one")


def test_stopped_and_started_amid_mounts(tmp_path):
    with served(tmp_path, docker=True) as daemon:
        docker(daemon, "Create", ID="one")
        path = Path(docker(daemon, "Get", ID="one"))
        for _ in range(2):
            daemon.restart()
            assert mount.is_mount_point(path.parent)
        docker(daemon, "Put", ID="one")
        assert not path.exists()


# What is wrong at the start


def test_a_start_that_fails_leaves_nothing(tmp_path):
    home = tmp_path / "graph"
    base = runtime_base()
    with socket.socket(socket.AF_UNIX) as other:
        taken = base / "taken.sock"
        other.bind(str(taken))
        other.listen()
        done = run([*_argv(home), "serve", f"--docker-socket={taken}"])
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"devmapper: {str(taken)!r}: another process listens there"
        ]
        taken.unlink()
    (base / "file").write_text("precious")
    done = run([*_argv(home), "serve", f"--containerd-socket={base}/file"])
    assert done.returncode == 1
    assert "not a socket" in done.stderr
    assert (base / "file").read_text() == "precious"
    (base / "file").unlink()
    assert [entry.name for entry in base.iterdir() if not entry.name.startswith(".")] == []
    assert serving(home) is None


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--storage-opt=dm.fs=zfs", "serve"), 2, "option --storage-opt: option dm.fs=zfs"),
        (("--engine=steam", "serve"), 2, "engine 'steam'"),
        (("serve", "--docker-socket=rel"), 2, "option --docker-socket: socket 'rel'"),
        (("serve", "--metrics-address=1"), 2, "option --metrics-address: address '1'"),
        (("serve", "--stop-time=soon"), 2, "option --stop-time is 'soon', expected a time"),
        (("serve", "--config=/nonexistent"), 2, "config file '/nonexistent' cannot be read"),
        (("serve", "extra"), 2, "got unexpected extra argument"),
    ],
)
def test_bad_words_make_nothing(tmp_path, words, status, told):
    home = tmp_path / "graph"
    done = run([*_argv(home), *words])
    assert done.returncode == status
    assert done.stderr.startswith(f"devmapper: {told}"), done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not home.exists()


def test_a_port_that_is_taken_starts_no_other_service(tmp_path):
    home = tmp_path / "graph"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run(
            [*_argv(home), "serve", f"--docker-socket={runtime_base()}/d.sock",
             f"--metrics-address=127.0.0.1:{port}"]
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (runtime_base() / "d.sock").exists()
    assert serving(home) is None
    assert not (home / "metadata").exists()


def test_a_damaged_graph_is_one_sentence(tmp_path):
    with served(tmp_path) as daemon:
        daemon.stop()
        daemon.command.stop()
        record = daemon.home / "metadata" / "base"
        good = record.read_bytes()
        record.write_bytes(b"{")
        done = run(daemon.argv())
        assert done.returncode == 30
        last = [line for line in done.stderr.splitlines() if line.startswith("devmapper: ")]
        assert len(last) == 1
        assert "Traceback" not in done.stderr
        assert serving(daemon.home) is None
        record.write_bytes(good)


def _argv(home: Path) -> list[str]:
    return [*PROGRAM, "--root", str(home), *(f"--storage-opt={option}" for option in SMALL)]


def test_a_full_pool_is_a_warning_in_the_log(tmp_path):
    with served(tmp_path, check_log=False, watch_data_low_water=100) as daemon:
        daemon.stop()
        assert " WARNING pool " in daemon.log.read_text()


# Memory


def test_the_idle_daemon_is_small(tmp_path):
    with served(tmp_path, **FRONT_ENDS) as daemon:
        docker_call(daemon.docker, "Plugin.Activate")
        with grpc.insecure_channel(f"unix:{daemon.containerd}") as channel:
            SnapshotsClient(channel).prepare("one")
            SnapshotsClient(channel).remove("one")
        assert b"devmapper_layers" in _get(daemon.metrics, "/metrics")
        time.sleep(0.5)
        assert daemon.rss() < 80 * MIB, f"{daemon.rss() / MIB:.1f} MiB"


def test_the_default_control_socket_is_beside_the_pool(tmp_path):
    with served(tmp_path) as daemon:
        assert control_socket(daemon.home).parent == runtime_base()


def test_an_engine_that_is_killed_is_started_again(tmp_path):
    """By whoever asks next; the last time by the watch, without a request."""
    again = "it is started again"
    options: dict[str, Any] = {"docker": True, "watch_interval": "100ms", "check_log": False}
    with served(tmp_path, engine="embedded", **options) as daemon:
        docker(daemon, "Create", ID="a")
        for number in range(2):
            os.kill(engine_process(daemon), signal.SIGKILL)
            docker(daemon, "Create", ID=f"b{number}", Parent="a")
        os.kill(engine_process(daemon), signal.SIGKILL)
        wait_for(lambda: daemon.log.read_text().count(again) == 3, daemon.log.read_text)
        listed = {each["id"] for each in daemon.command("--json", "ls").json}
        assert listed == {"base", "a", "b0", "b1"}
