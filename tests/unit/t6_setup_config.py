"""What the graph remembers of the disk that its pool was made of, and LVM's names."""

import pytest

from devmapper.deviceset import setup_config
from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.options import parse_options
from devmapper.deviceset.setup_config import POOL_NAME, SetupConfig, with_given_pool
from devmapper.errors import EnvironmentLacking, PoolMismatch, RecordCorrupt, UsageError
from devmapper.linux import lvm
from tests.support.local_engine import LocalEngine

DISK = "dm.directlvm_device=/dev/sdx"


def config(*words: str) -> SetupConfig:
    found = SetupConfig.of(parse_options([DISK, *words]))
    assert found is not None
    return found


def test_dockers_file_is_read_and_written_to_the_byte(tmp_path):
    # As moby's json.Marshal of directLVMConfig writes it; 0 is what was not given
    raw = (
        b'{"Device":"/dev/sdx","ThinpPercent":90,"ThinpMetaPercent":2,"AutoExtendPercent":0,'
        b'"AutoExtendThreshold":70}'
    )
    words = ("dm.thinp_percent=90", "dm.thinp_metapercent=2", "dm.thinp_autoextend_threshold=70%")
    setup_config.save(tmp_path, config(*words))
    assert (tmp_path / "setup-config.json").read_bytes() == raw
    assert setup_config.load(tmp_path) == config(*words)


def test_a_default_that_is_spelled_out_is_the_same(tmp_path):
    spelled = config("dm.thinp_percent=95", "dm.thinp_metapercent=1")
    setup_config.check_unchanged(config(), spelled)
    with pytest.raises(PoolMismatch, match="AutoExtendPercent is 20, but 30 was asked for"):
        setup_config.check_unchanged(config(), config("dm.thinp_autoextend_percent=30"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"Device":7}',
        b'{"Device":"/dev/x","ThinpPercent":"90"}',
        b'{"Device":"/dev/x","ThinpPercent":101}',
        b'{"Device":"/dev/x","ThinpPercent":true}',
        b"\xff",
    ],
)
def test_a_damaged_file_stops_the_start_and_stays(tmp_path, raw):
    file = tmp_path / "setup-config.json"
    file.write_bytes(raw)
    with pytest.raises(RecordCorrupt):
        DeviceSet(tmp_path, engine=LocalEngine())
    assert file.read_bytes() == raw


def test_which_pool_a_graph_uses(tmp_path):
    def pool(*words: str) -> str | None:
        return with_given_pool(tmp_path, parse_options(words)).thin_pool_device

    assert pool() is None
    assert pool(DISK) == POOL_NAME
    assert pool("dm.thinpooldev=/dev/mapper/vg-pool") == "vg-pool"
    setup_config.save(tmp_path, config())
    assert pool() == POOL_NAME
    assert pool("dm.thinpooldev=vg-pool") == "vg-pool"
    assert pool("dm.datadev=/dev/a", "dm.metadatadev=/dev/b") is None
    assert not with_given_pool(tmp_path, parse_options([])).discard_on_delete


def test_an_engine_without_device_mapper_refuses_before_anything_is_touched(tmp_path):
    from devmapper.deviceset.make_pool import make_pool
    from devmapper.engine.embedded.client import EmbeddedEngine

    with pytest.raises(UsageError, match="kernel's device mapper"):
        make_pool(tmp_path / "home", parse_options([DISK]), EmbeddedEngine())
    assert not (tmp_path / "home").exists()


def test_without_lvm_the_package_and_another_way_are_named(tmp_path, monkeypatch):
    from devmapper.deviceset import direct_lvm

    def lacking(name: str) -> str:
        raise EnvironmentLacking(f"program {name!r} is not installed", hint="install it")

    monkeypatch.setattr(direct_lvm, "find_tool", lacking)
    with pytest.raises(EnvironmentLacking) as caught:
        direct_lvm.set_up(tmp_path, parse_options([DISK]), has_layers=lambda: False)
    assert "dm.datadev and dm.metadatadev" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "volume"),
    [
        ("docker-thinpool", ("docker", "thinpool")),
        ("docker-thinpool-tpool", ("docker", "thinpool")),
        ("my--group-thin--pool", ("my-group", "thin-pool")),
        ("a--b--c-d", ("a-b-c", "d")),
        ("plain", None),
        ("docker-8:1-42-pool", None),
    ],
)
def test_names_of_lvm(name, volume):
    assert lvm.volume_of(name) == volume
