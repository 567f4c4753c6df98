"""Layers over NBD: the command, QEMU's tools, snapshots while a client writes, who holds what."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import devmapper
from devmapper.driver import Driver
from devmapper.engine.embedded import runtime
from devmapper.errors import LayerBusy, LayerNotMounted, UsageError
from devmapper.linux import blockdev, mount
from devmapper.snapshots import Snapshots
from devmapper.units import MIB
from tests.support import capabilities, nbd_client, thin_tools
from tests.support.command import commands
from tests.support.leftovers import assert_nothing_left
from tests.support.nbd_client import NbdClient
from tests.support.pools import Background
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

OPTIONS = ("dm.loopdatasize=1G", "dm.loopmetadatasize=16M", "dm.basesize=256M", "dm.fs=ext4")


@pytest.fixture
def dm(tmp_path):
    with commands(tmp_path / "home") as command:
        yield command


@pytest.fixture
def driver(tmp_path: Path, runtime_base: Path) -> Iterator[Driver]:
    opened = devmapper.init(tmp_path / "graph", OPTIONS, engine="embedded")
    yield opened
    if opened.devices.is_open:
        opened.cleanup()
    if not capabilities.tools():
        assert thin_tools.thin_check(tmp_path / "graph" / "devicemapper" / "metadata")
    assert_nothing_left(runtime_base)


def socket_of(uri: str) -> str:
    assert uri.startswith("nbd+unix:///?socket=/")
    return uri.split("=", 1)[1]


def qemu(tool: str, *words: object) -> str:
    done = subprocess.run(
        [tool, *map(str, words)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


@contextmanager
def mounted(driver: Driver, layer: str) -> Iterator[Path]:
    root = Path(driver.get(layer))
    try:
        yield root
    finally:
        driver.put(layer)


# The command


def test_the_command_serves_and_ends_it(dm, tmp_path):
    dm("create", "vm")
    uri = dm("nbd", "vm").text.strip()
    path = Path(socket_of(uri))
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert path.stat().st_mode & 0o777 == 0o600
    assert dm("--json", "nbd", "vm").json == {
        "id": "vm", "uri": uri, "socket": str(path), "read_only": False,
    }  # fmt: skip
    (shown,) = dm("--json", "engine", "status").json["devices"]
    assert shown["nbd"] == {"uri": uri, "read_only": False, "clients": []}
    assert dm("--json", "nbd", "vm", "--stop").json == {"id": "vm", "stopped": True}
    assert dm("--json", "nbd", "vm", "--stop").json == {"id": "vm", "stopped": False}
    assert not path.exists()
    chosen = tmp_path / "chosen.sock"
    uri = dm("nbd", "vm", "--socket", chosen, "--read-only").text.strip()
    assert uri == f"nbd+unix:///?socket={chosen}"
    assert chosen.stat().st_mode & 0o777 == 0o600
    assert "is busy: held by its NBD socket" in dm.fails(12, "nbd", "vm")
    assert dm("--json", "deactivate", "vm").json == {"id": "vm", "deactivated": True}
    assert not chosen.exists()


def test_a_disk_by_the_command(dm):
    dm("create", "vm")
    path = dm("activate", "vm").text.strip()
    assert blockdev.is_block_device(Path(path))
    assert "block device" in dm.fails(12, "nbd", "vm")
    assert dm("--json", "nbd", "vm", "--stop").json["stopped"] is False
    assert blockdev.is_block_device(Path(path))
    assert dm("--json", "activate", "vm").json == {"id": "vm", "path": path}
    dm("deactivate", "vm")
    assert dm("--json", "deactivate", "vm").json["deactivated"] is False


def test_bad_input_to_the_command(dm, tmp_path):
    dm.fails(20, "nbd", "vm")
    dm("create", "vm")
    dm.fails(10, "nbd", "none")
    dm.fails(10, "activate", "none")
    dm.fails(10, "deactivate", "none")
    dm.fails(10, "nbd", "none", "--stop")
    dm.fails(2, "nbd", "../vm")
    dm.fails(2, "nbd", "vm", "--stop", "--read-only")
    file = tmp_path / "file"
    file.write_text("mine")
    assert "no socket" in dm.fails(2, "nbd", "vm", "--socket", file)
    assert file.read_text() == "mine"
    assert "longer" in dm.fails(2, "nbd", "vm", "--socket", tmp_path / ("x" * 120))
    dm.fails(3, "nbd", "vm", "--socket", tmp_path / "no" / "s")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        assert "listens" in dm.fails(2, "nbd", "vm", "--socket", tmp_path / "other")
    dm("nbd", "vm", "--socket", tmp_path / "other")  # nobody's any more
    assert dm("--json", "ls").json[1]["active"] is True


def test_the_socket_goes_with_the_engine_and_its_layer(dm, tmp_path):
    dm("create", "vm")
    path = Path(socket_of(dm("nbd", "vm").text.strip()))
    dm("engine", "stop")
    assert not path.exists()
    chosen = tmp_path / "chosen.sock"
    dm("nbd", "vm", "--socket", chosen)
    dm("rm", "vm")
    assert not chosen.exists()


# QEMU's tools


@pytest.mark.qemu
def test_qemu_img_and_qemu_io(driver, tmp_path):
    driver.create("vm")
    with mounted(driver, "vm") as root:
        (root / "data").write_bytes(os.urandom(20 * MIB))
    disk = driver.activate("vm")
    image = tmp_path / "before.raw"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "raw", disk, image)
    driver.deactivate("vm")
    uri = driver.serve_nbd("vm")
    shown = qemu("qemu-img", "info", uri)
    assert "file format: raw" in shown
    assert f"({256 * MIB} bytes)" in shown
    qemu("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, image)  # fails if they differ
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "copy.qcow2")
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, tmp_path / "copy.qcow2")
    out = qemu(
        "qemu-io", "-f", "raw",
        "-c", "write -P 0xab 100M 1M", "-c", "write -f -P 0xcd 200M 64k", "-c", "flush",
        "-c", "read -P 0xab 100M 1M", "-c", "write -z 100M 512k", "-c", "read -P 0 100M 512k",
        "-c", "write -z -u 101M 512k", "-c", "discard 100M 2M", "-c", "read -P 0 100M 2M",
        "-c", "read -P 0xcd 200M 64k", "-c", "write -P 7 777 100", "-c", "read -P 7 777 100",
        uri,
    )  # fmt: skip
    assert "failed" not in out
    assert "error" not in out.lower()
    mapped = json.loads(qemu("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert sum(part["length"] for part in mapped) == 256 * MIB
    data = sum(part["length"] for part in mapped if part["data"])
    assert 20 * MIB <= data < 60 * MIB  # what is not mapped is known, and not read
    listed = qemu("qemu-nbd", "--list", "--socket", socket_of(uri))
    assert "exports available: 1" in listed
    assert re.search(r"size: +268435456", listed)
    assert re.search(r"min block: +512", listed)
    driver.deactivate("vm")
    # And the other way: an image becomes a layer's content
    driver.create("copy")
    uri = driver.serve_nbd("copy")
    qemu("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, image)
    driver.deactivate("copy")
    with mounted(driver, "copy") as root:
        assert (root / "data").stat().st_size == 20 * MIB


@pytest.mark.qemu
def test_a_read_only_export_takes_no_writes(driver):
    driver.create("vm")
    uri = driver.serve_nbd("vm", read_only=True)
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 4k", uri], capture_output=True, text=True
    )
    assert done.returncode != 0 or "failed" in done.stdout
    assert "failed" not in qemu("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", uri)
    driver.deactivate("vm")


# A client is a user


def test_a_client_keeps_its_layer(driver):
    driver.create("vm")
    uri = driver.serve_nbd("vm")
    with NbdClient.ready(socket_of(uri)) as client:
        for call in (driver.remove, driver.deactivate, driver.get, driver.activate):
            with pytest.raises(LayerBusy, match=f"process {os.getpid()} .* over NBD"):
                call("vm")
        with pytest.raises(LayerBusy):
            driver.cleanup()
        assert client.read(0, 512) is not None
        assert driver.serve_nbd("vm") == uri
        with pytest.raises(LayerBusy):
            driver.serve_nbd("vm", read_only=True)
        (info,) = driver.devices.pool.devices()
        assert info.open_count == 1
    (info,) = driver.devices.pool.devices()  # at once, as after close(2) of a device
    assert info.open_count == 0
    with pytest.raises(LayerBusy, match="NBD socket"):  # served to nobody: still not mounted
        driver.get("vm")
    driver.remove("vm")  # but idle, as a block device is that nobody has opened
    assert not Path(socket_of(uri)).exists()


def test_put_does_not_end_what_get_did_not_begin(driver):
    driver.create("vm")
    uri = driver.serve_nbd("vm")
    with pytest.raises(LayerNotMounted):
        driver.put("vm")
    with NbdClient.ready(socket_of(uri)) as client:
        assert client.read(0, 512) is not None
    driver.deactivate("vm")


def test_a_snapshot_that_was_served_can_be_committed(driver):
    snapshots = Snapshots(driver.devices)
    (only,) = snapshots.prepare("key")
    (layer,) = (
        each for each in driver.layers() if str(driver.devices.device_path(each)) == only.source
    )
    driver.deactivate(layer)
    path = socket_of(driver.serve_nbd(layer))
    with NbdClient.ready(path) as client:
        client.write(200 * MIB, b"not flushed by its client" + bytes(487))
    snapshots.commit("name", "key")
    assert driver.devices.pool.devices() == []
    assert not Path(path).exists()
    (view,) = snapshots.view("look", "name")
    with blockdev.opened(Path(view.source), os.O_RDONLY) as fd:
        assert os.pread(fd, 25, 200 * MIB) == b"not flushed by its client"
    snapshots.remove("look")


def test_a_mounted_layer_is_not_served(driver):
    driver.create("vm")
    with mounted(driver, "vm"), pytest.raises(LayerBusy, match="mounted at"):
        driver.serve_nbd("vm")
    driver.serve_nbd("vm")
    driver.deactivate("vm")


def test_a_deletion_is_put_off_until_the_last_client_is_gone(tmp_path):
    deferred = ("dm.use_deferred_removal=true", "dm.use_deferred_deletion=true")
    graph = tmp_path / "deferred"
    with devmapper.init(graph, (*OPTIONS, *deferred), engine="embedded") as driver:
        driver.create("vm")
        path = socket_of(driver.serve_nbd("vm"))
        with NbdClient.ready(path) as client:
            assert driver.remove("vm") == "put off"
            assert not driver.exists("vm")
            client.write(0, b"still there" + bytes(501))
            assert client.call(nbd_client.FLUSH) == 0
            with NbdClient(path) as late:
                answers = late.answers(nbd_client.GO, nbd_client.info_data(b""))
                assert answers[-1].kind == nbd_client.ERR_SHUTDOWN
        wait_for(lambda: not driver.devices.pool.devices())
        driver.devices._deletions.complete_all()
        assert driver.devices.consistency().deleted == ()
        driver.cleanup()
    assert thin_tools.thin_check(graph / "devicemapper" / "metadata")


def test_sigterm_to_the_engine_waits_for_clients(driver):
    driver.create("vm")
    path = socket_of(driver.serve_nbd("vm"))
    pool = driver.devices.pool
    paths = runtime.paths_of(pool.name)
    server = runtime.read_pid(paths)
    assert server is not None
    with NbdClient.ready(path) as client:
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: "still serving" in paths.log.read_text())
        assert f"process {os.getpid()}" in paths.log.read_text()
        client.write(0, b"x" * 512)
        assert client.call(nbd_client.FLUSH) == 0
        server.send_signal(signal.SIGTERM)  # forced
        assert server.wait(60)
        assert client.has_ended()
    driver.close()


# Snapshots


def test_snapshots_while_a_client_writes(driver, tmp_path):
    """Each snapshot is a moment: of two places written in turn, the first is never behind."""
    driver.create("vm")
    path = socket_of(driver.serve_nbd("vm"))
    written = [0]
    stop: list[None] = []
    with NbdClient.ready(path) as client:

        def run() -> None:
            while not stop:
                written[0] += 1
                stamp = written[0].to_bytes(8, "big") * 64
                client.write(100 * MIB, stamp)
                client.write(200 * MIB, stamp)

        writer = Background(run)
        snapshots = []
        try:
            for number in range(8):
                name = f"snap{number}"
                low = written[0]
                driver.create(name, "vm")
                snapshots.append((name, low, written[0]))
                time.sleep(0.02)
        finally:
            stop.append(None)
            writer.result()
    last = -1
    for name, low, high in snapshots:
        with NbdClient.ready(socket_of(driver.serve_nbd(name, read_only=True))) as reader:
            first = int.from_bytes(reader.read(100 * MIB, 8), "big")
            second = int.from_bytes(reader.read(200 * MIB, 8), "big")
        assert first - second in (0, 1), (name, first, second)
        assert low - 1 <= second
        assert first <= high + 1
        assert first >= last
        last = first
        driver.deactivate(name)
    assert last > 0


def test_requests_wait_while_the_device_is_suspended(driver):
    driver.create("vm")
    with NbdClient.ready(socket_of(driver.serve_nbd("vm"))) as client:
        client.write(0, b"1" * 512)
        pool = driver.devices.pool
        (info,) = pool.devices()
        with pool.suspended(info.name):
            assert [each.state for each in pool.devices()] == ["suspended"]
            cookie = client.ask(nbd_client.WRITE, 0, 512, b"2" * 512)
            client.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.reply()
            with pytest.raises(LayerBusy):
                driver.deactivate("vm")
        client.socket.settimeout(60)
        assert client.reply() == (0, cookie)


def test_a_socket_of_a_users_choice_may_lie_on_a_layer(driver):
    """The engine touches no file system that may stand on its own devices."""
    driver.create("vm")
    driver.create("shelf")
    with mounted(driver, "shelf") as root:
        uri = driver.serve_nbd("vm", root / "s")
        with NbdClient.ready(socket_of(uri)) as client:
            assert client.read(0, 512) is not None
        driver.deactivate("vm")
        assert not (root / "s").exists()
    assert mount.mountinfo()


def test_bad_sockets(driver, tmp_path):
    driver.create("vm")
    with pytest.raises(UsageError):
        driver.serve_nbd("vm", tmp_path / ("x" * 200))
    with pytest.raises(UsageError):
        driver.serve_nbd("vm", tmp_path)
    assert driver.devices.pool.devices() == []
