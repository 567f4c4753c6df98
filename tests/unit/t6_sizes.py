"""Sizes of layers and of the base: what is refused, what fails and is taken back."""

import json
from pathlib import Path

import pytest

from devmapper.deviceset.layer_options import LayerOptions, parse_layer_options
from devmapper.deviceset.owners import owner_of
from devmapper.errors import LayerBusy, ToolError, UsageError
from devmapper.linux.fs_geometry import geometry
from devmapper.units import GIB, MIB, Bytes
from tests.support.graphs import check_consistent, open_small, records
from tests.support.local_engine import LocalEngine


@pytest.fixture
def engine():
    engine = LocalEngine()
    yield engine
    engine.crash()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "graph"


def content(home: Path, layer: str) -> Path:
    """The file in which the engine keeps what a layer holds."""
    return home / "devicemapper" / "contents" / str(records(home)[layer]["device_id"])


def test_options_of_a_layer_are_read_as_docker_reads_them():
    assert parse_layer_options({}) == LayerOptions(None)
    assert parse_layer_options({"SIZE": "1.5 GiB"}) == LayerOptions(Bytes(3 * GIB // 2))
    with pytest.raises(UsageError, match=r"size=20X .*size such as 20G"):
        parse_layer_options({"size": "20X"})
    with pytest.raises(UsageError, match="'colour' of a layer is unknown"):
        parse_layer_options({"size": "20G", "colour": "red"})


def test_a_layer_has_its_own_size_and_its_children_inherit_it(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("same", "", size=8 * MIB)
        devices.add_device("large", "same", size=24 * MIB)
        devices.add_device("child", "large")
        devices.add_device("larger", "large", size=32 * MIB + 100)
        sizes = {layer: devices.dev_info(layer).size for layer in devices.list()}
        assert sizes == {
            "": 8 * MIB,
            "same": 8 * MIB,
            "large": 24 * MIB,
            "child": 24 * MIB,
            "larger": 32 * MIB + 100,
        }
        for layer in ("large", "child"):
            assert geometry(content(home, layer)).size == 24 * MIB
            assert not devices.has_activated_device(layer)
        assert geometry(content(home, "larger")).size == 32 * MIB
        assert geometry(content(home, "same")).size == 8 * MIB
        check_consistent(home, devices)


def test_a_size_below_the_parents_is_refused_with_both(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("large", "", size=16 * MIB)
        before = records(home)
        with pytest.raises(UsageError, match=rf"{16 * MIB - 1} bytes .*'large'.* {16 * MIB} bytes"):
            devices.add_device("small", "large", size=16 * MIB - 1)
        assert records(home) == before
        check_consistent(home, devices)


def test_a_layer_whose_file_system_cannot_grow_is_not_left_behind(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("damaged", "")
        raw = bytearray(content(home, "damaged").read_bytes())
        raw[2048:16384] = bytes(16384 - 2048)  # the group descriptors
        content(home, "damaged").write_bytes(raw)
        before = records(home)
        with pytest.raises(ToolError, match="e2fsck"):
            devices.add_device("large", "damaged", size=16 * MIB)
        assert records(home) == before
        assert devices.pool.devices() == []
        check_consistent(home, devices)
        devices.add_device("large", "", size=16 * MIB)


def test_what_cannot_be_taken_back_is_left_to_the_next_start(home, engine):
    with open_small(home, engine) as devices:
        pool = next(iter(engine.pools.values()))
        devices.add_device("empty", "")
        content(home, "empty").write_bytes(b"")  # no file system at all
        pool.broken["delete"] = OSError(5, "broken")
        with pytest.raises(OSError, match="unknown kind of file system") as caught:
            devices.add_device("large", "empty", size=16 * MIB)
        assert "next start" in str(caught.value.__notes__)
        assert records(home)["large"]["deleted"]
        assert not devices.has_device("large")
        pool.broken.clear()
    with open_small(home, engine) as devices:
        assert set(records(home)) == {"base", "empty"}
        check_consistent(home, devices)


def test_the_base_grows_by_option_and_layers_keep_their_size(home, engine):
    with open_small(home, engine) as devices:
        devices.add_device("old", "")
    with open_small(home, engine, base_size="16M") as devices:
        devices.add_device("new", "")
        sizes = {layer: devices.dev_info(layer).size for layer in devices.list()}
        assert sizes == {"": 16 * MIB, "new": 16 * MIB, "old": 8 * MIB}
        assert geometry(content(home, "new")).size == 16 * MIB
        assert geometry(content(home, "old")).size == 8 * MIB
        check_consistent(home, devices)


def test_only_a_size_that_was_given_counts(home, engine):
    with open_small(home, engine):
        pass
    with open_small(home, engine, base_size=None) as devices:
        assert devices.dev_info("").size == 8 * MIB
    with pytest.raises(UsageError, match=rf"dm\.basesize={7 * MIB} .*{8 * MIB} bytes"):
        open_small(home, engine, base_size="7M")
    assert records(home)["base"]["size"] == 8 * MIB


def test_a_base_that_cannot_grow_keeps_its_size(home, engine):
    with open_small(home, engine):
        pass
    pool = next(iter(engine.pools.values()))
    pool.broken["activate"] = OSError(28, "no room")
    with pytest.raises(OSError, match="no room"):
        open_small(home, engine, base_size="16M")
    pool.broken.clear()
    # in doubt the larger size stays, and the next start goes on
    assert records(home)["base"]["growing_from"] == 8 * MIB
    raw = content(home, "base").read_bytes()
    content(home, "base").write_bytes(raw[:2048] + bytes(14336) + raw[16384:])
    with pytest.raises(ToolError):
        open_small(home, engine, base_size="16M")
    assert records(home)["base"]["size"] == 8 * MIB
    assert "growing_from" not in records(home)["base"]
    content(home, "base").write_bytes(raw)
    with open_small(home, engine, base_size="16M") as devices:
        assert devices.dev_info("").size == 16 * MIB


def test_a_growth_that_cannot_be_completed_does_not_stop_the_start(home, engine, caplog):
    with open_small(home, engine):
        pass
    path = home / "metadata" / "base"
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({**record, "size": 16 * MIB, "growing_from": 8 * MIB}))
    raw = content(home, "base").read_bytes()
    content(home, "base").write_bytes(raw[:2048] + bytes(14336) + raw[16384:])
    with open_small(home, engine, base_size=None) as devices:
        assert devices.dev_info("").size == 8 * MIB
    assert "could not grow and keeps" in caplog.text


def test_a_base_in_use_does_not_grow(home, engine):
    with open_small(home, engine) as devices:
        name = devices.dev_info("").name()
        record = devices.dev_info("")
        pool = next(iter(engine.pools.values()))
        pool.activate(name, record.device_id, record.size)
        pool.in_use.add(name)
        with pytest.raises(LayerBusy, match="base"):
            open_small(home, engine, base_size="16M")
        pool.in_use.clear()
    with open_small(home, engine, base_size=None) as devices:
        assert devices.pool.devices() == []


def test_what_docker_left_half_done_is_completed_where_the_option_asks_again(home, engine):
    """moby records the size first; killed before the file system has grown, it never goes on."""
    with open_small(home, engine) as devices:
        devices.shutdown()
    path = home / "metadata" / "base"
    path.write_text(path.read_text().replace(f'"size":{8 * MIB}', f'"size":{16 * MIB}'))
    with open_small(home, engine, base_size=None) as devices:
        assert geometry(content(home, "base")).size == 8 * MIB
        devices.shutdown()
    with open_small(home, engine, base_size="16M") as devices:
        assert geometry(content(home, "base")).size == 16 * MIB
        assert devices.dev_info("").size == 16 * MIB


def test_another_file_system_than_the_bases_is_mentioned(home, engine, caplog):
    with open_small(home, engine):
        pass
    with open_small(home, engine, "dm.fs=ext4"):
        assert "dm.fs" not in caplog.text
    with open_small(home, engine, "dm.fs=xfs") as devices:
        assert "dm.fs=xfs has no effect" in caplog.text
        assert devices.status().base_file_system == "ext4"


def test_an_owner_is_remembered_where_docker_does_not_look(engine, home):
    with open_small(home, engine) as devices:
        devices.add_device("a", "", owner="docker")
        devices.add_device("b", "a", size=16 * MIB, owner="containerd")
        devices.add_device("c", "a")
        store = devices.parts.graph.store
        owners = {layer: owner_of(record) for layer, record in store.load_all().items()}
    assert owners == {"": "", "a": "docker", "b": "containerd", "c": ""}
    assert (home / "metadata" / "a").read_text().endswith(',"deleted":false,"owner":"docker"}')
