"""The readers of pool metadata agree with thin-provisioning-tools on sound and damaged images."""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devmapper.errors import IntegrityError
from devmapper.thin.blocks import FileDevice
from devmapper.thin.check import CheckReport, DamageKind, check
from devmapper.thin.delta import changed_ranges, delta
from devmapper.thin.dump import dump
from devmapper.thin.ls import ls
from tests.support import metadata_writer as on_disk
from tests.support.fixtures import DOCKER_GRAPHS, unpack_docker_graph
from tests.support.metadata_writer import Image, Run, Thin, build, pool_xml
from tests.support.thin_tools import (
    thin_check,
    thin_check_fails,
    thin_delta,
    thin_dump,
    thin_ls,
)

pytestmark = pytest.mark.tools

LS_FIELDS = "DEV,MAPPED_BLOCKS,EXCLUSIVE_BLOCKS,SHARED_BLOCKS,TRANSACTION,CREATE_TIME,SNAP_TIME"
_DELTA_TAG = re.compile(r'<(same|different|left_only|right_only) begin="(\d+)" length="(\d+)"/>')


@contextmanager
def untouched(path: Path) -> Iterator[FileDevice]:
    """Open a device for reading and prove that its bytes stay as they are."""
    before = hashlib.sha256(path.read_bytes()).digest()
    with FileDevice.open(path, read_only=True) as device:
        yield device
    assert hashlib.sha256(path.read_bytes()).digest() == before


def check_file(path: Path) -> CheckReport:
    with untouched(path) as device:
        return check(device)


def assert_equal_to_tools(path: Path, *, thin_ids: tuple[int, ...] = ()) -> None:
    """Every reader says of *path* what the tool of its name says."""
    checked = thin_check(path)
    assert checked, checked.output
    with untouched(path) as device:
        assert check(device).damages == []
        assert "".join(dump(device)) == thin_dump(path)
        listed = thin_ls(path, "--no-headers", "-o", LS_FIELDS).splitlines()
        usages = ls(device)
        assert [list(usage[:7]) for usage in usages] == [
            [int(word) for word in line.split()] for line in listed
        ]
        for left, right in pairwise(thin_ids):
            assert_delta_equals(device, path, left, right)


def assert_delta_equals(device: FileDevice, path: Path, left: int, right: int) -> None:
    expected = [
        (int(begin), int(length), kind.replace("different", "differ"))
        for kind, begin, length in _DELTA_TAG.findall(thin_delta(path, left, right))
    ]
    found = list(delta(device, left, right))
    assert found == expected
    changed = [run for run in found if run.kind != "same"]
    assert list(delta(device, left, right, include_same=False)) == changed
    ranges = list(changed_ranges(device, left, right))
    assert sum(run.length for run in changed) == sum(part.length for part in ranges)


# Sound metadata.


def test_an_empty_pool(tmp_path: Path) -> None:
    assert_equal_to_tools(build(tmp_path / "m", pool_xml({}, block_sectors=2048)).path)


def test_thin_devices_without_mappings(tmp_path: Path) -> None:
    # thin_delta reads behind the end of an empty list, so it is left out here.
    assert_equal_to_tools(build(tmp_path / "m", pool_xml({0: Thin(), 16_777_215: Thin()})).path)


def test_runs_end_where_key_data_block_or_time_does_not_go_on(tmp_path: Path) -> None:
    runs = on_disk.runs(
        (0, 0, 5, 0), (5, 5, 5, 1), (10, 11, 5, 1), (16, 16, 1, 1), (18, 17, 1, 1), (19, 18, 700, 1)
    )
    other = on_disk.runs((0, 0, 3, 0), (5, 5, 900, 1), (1000, 1000, 1, 1))
    image = build(tmp_path / "m", pool_xml({1: Thin(runs), 2: Thin(other)}))
    assert_equal_to_tools(image.path, thin_ids=(1, 2, 1))


def test_block_and_time_at_their_limits(tmp_path: Path) -> None:
    last = 65535
    runs = on_disk.runs((0, last, 1, 2**24 - 1), (2**40, last - 1, 1, 7), (2**48, 0, 2, 0))
    image = build(tmp_path / "m", pool_xml({1: Thin(runs), 9: Thin(runs[:2])}))
    assert_equal_to_tools(image.path, thin_ids=(1, 9))


def test_many_thin_devices_make_a_top_level_of_more_than_one_node(tmp_path: Path) -> None:
    thins = {3 * i: Thin((Run(0, 0, 20), Run(100 + i, 100 + i, 3, 1)), i, 1, 2) for i in range(300)}
    image = build(tmp_path / "m", pool_xml(thins))
    assert image.u32(image.mapping_root, 4) == 1  # an internal node
    assert_equal_to_tools(image.path, thin_ids=(0, 3, 897))


def test_a_metadata_snap(tmp_path: Path) -> None:
    thins = {i: Thin((Run(10 * i, 500 * i, 400, i),)) for i in range(4)}
    image = build(tmp_path / "m", pool_xml(thins))
    image.hold_metadata_snap()
    assert_equal_to_tools(image.path, thin_ids=(0, 3))
    with untouched(image.path) as device:
        assert "".join(dump(device, metadata_snap=True)) == thin_dump(image.path, "-m")


def test_dump_of_one_thin_device(tmp_path: Path) -> None:
    image = build(tmp_path / "m", pool_xml({i: Thin((Run(i, i, 9),)) for i in range(5)}))
    with untouched(image.path) as device:
        assert "".join(dump(device, dev_ids=[3])) == thin_dump(image.path, "--dev-id", "3")


@pytest.mark.parametrize("name", DOCKER_GRAPHS)
def test_the_pool_of_a_real_dockerd(name: str, tmp_path: Path) -> None:
    folder = unpack_docker_graph(name, tmp_path)
    path = folder / "graph" / "devicemapper" / "devicemapper" / "metadata"
    assert_equal_to_tools(path, thin_ids=(1, 2, 3, 4, 5, 10, 18, 1))
    report = check_file(path)
    assert report.notes == []  # the kernel leaves no summary behind that is off
    assert not report.needs_check


@st.composite
def pools(draw: st.DrawFn) -> dict[int, Thin]:
    thins = {}
    for thin_id in draw(st.lists(st.integers(0, 2**24 - 1), max_size=6, unique=True)):
        runs, origin = [], 0
        for _ in range(draw(st.integers(1, 12))):
            origin += draw(st.sampled_from((0, 0, 1, 2, 251, 5000)))
            length = draw(st.sampled_from((1, 1, 2, 7, 60, 300)))
            data = draw(st.sampled_from((0, origin, 400, 1000))) + draw(st.integers(0, 3))
            runs.append(Run(origin, data, length, draw(st.integers(0, 2))))
            origin += length
        numbers = st.integers(0, 2**31)
        thins[thin_id] = Thin(tuple(runs), draw(numbers), draw(numbers), draw(numbers))
    return thins


@settings(max_examples=25, deadline=None)
@given(pools())
def test_any_pool_reads_as_the_tools_read_it(thins: dict[int, Thin]) -> None:
    with TemporaryDirectory() as folder:
        image = build(Path(folder) / "m", pool_xml(thins, nr_data_blocks=70_000), size=1 << 20)
        assert_equal_to_tools(image.path, thin_ids=tuple(sorted(thins)))


# Damaged metadata: we find it where thin_check does, and name it.

Damager = Callable[[Image], tuple[str, int]]
ENTRY = 40  # of a node that is patched


def flip_in_leaf(image: Image) -> tuple[str, int]:
    leaf = image.first_leaf(image.thin_root(2))
    image.flip(leaf, 1000)
    return "mapping", leaf


def flip_in_details(image: Image) -> tuple[str, int]:
    image.flip(image.details_root, 40)
    return "details", image.details_root


def flip_in_top_level(image: Image) -> tuple[str, int]:
    image.flip(image.mapping_root, 40)
    return "mapping", image.mapping_root


def flip_in_superblock(image: Image) -> tuple[str, int]:
    image.flip(0, 60)
    return "superblock", 0


def flip_in_metadata_index(image: Image) -> tuple[str, int]:
    block = image.metadata_index
    image.flip(block, 60)
    return "index", block


def flip_in_metadata_bitmap(image: Image) -> tuple[str, int]:
    block = image.metadata_bitmap()
    image.flip(block, 60)
    return "bitmap", block


def flip_in_data_index(image: Image) -> tuple[str, int]:
    block = image.data_index
    image.flip(block, 60)
    return "index", block


def flip_in_ref_counts(image: Image) -> tuple[str, int]:
    image.flip(image.data_ref_counts, 60)
    return "node", image.data_ref_counts


def wrong_blocknr(image: Image) -> tuple[str, int]:
    leaf = image.first_leaf(image.thin_root(1))
    image.set_u64(leaf, 8, 5, on_disk.NODE_SALT)
    return "mapping", leaf


def wrong_key_order(image: Image) -> tuple[str, int]:
    leaf = image.first_leaf(image.thin_root(1))
    image.set_u64(leaf, on_disk.KEYS_AT + 8 * ENTRY, 1, on_disk.NODE_SALT)
    return "mapping", leaf


def wrong_value_size(image: Image) -> tuple[str, int]:
    leaf = image.first_leaf(image.thin_root(1))
    image.set_u32(leaf, 24, 16, on_disk.NODE_SALT)
    return "mapping", leaf


def too_few_entries(image: Image) -> tuple[str, int]:
    leaf = image.first_leaf(image.thin_root(1))
    image.set_u32(leaf, 16, 3, on_disk.NODE_SALT)
    return "mapping", leaf


def wrong_parent_key(image: Image) -> tuple[str, int]:
    root = image.thin_root(1)
    child = image.u64(root, image.value_at(root, 1))
    key = image.u64(root, on_disk.KEYS_AT + 8)
    image.set_u64(root, on_disk.KEYS_AT + 8, key + 1, on_disk.NODE_SALT)
    return "mapping", child


def metadata_count_too_low(image: Image) -> tuple[str, int]:
    block = image.details_root
    image.set_bitmap_count(image.metadata_bitmap(), block, 0)
    return "metadata ref count", block


def metadata_leak(image: Image) -> tuple[str, int]:
    image.set_bitmap_count(image.metadata_bitmap(), 900, 1)
    return "leak", 900


DAMAGES: list[Damager] = [
    flip_in_leaf,
    flip_in_details,
    flip_in_top_level,
    flip_in_superblock,
    flip_in_metadata_index,
    flip_in_metadata_bitmap,
    flip_in_data_index,
    flip_in_ref_counts,
    wrong_blocknr,
    wrong_key_order,
    wrong_value_size,
    too_few_entries,
    wrong_parent_key,
    metadata_count_too_low,
    metadata_leak,
]


def sample(path: Path) -> Image:
    thins = {
        i: Thin(tuple(Run(2 * k, k if k < 300 else 1000 * i + k, 1, 0) for k in range(600)))
        for i in range(1, 6)
    }
    return build(path, pool_xml(thins))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_where_thin_check_finds_some(damage: Damager, tmp_path: Path) -> None:
    image = sample(tmp_path / "m")
    kind, block = damage(image)
    thin_check_fails(image.path)
    damages = check_file(image.path).damages
    assert (kind, block) in [(found.kind, found.block) for found in damages]
    for found in damages:
        assert re.search(r"\d", str(found))
        assert "\n" not in str(found)


@pytest.mark.parametrize(
    "damage",
    [flip_in_leaf, flip_in_details, flip_in_top_level, flip_in_superblock, wrong_key_order],
)
def test_dump_stops_at_damage_as_thin_dump_does(damage: Damager, tmp_path: Path) -> None:
    image = sample(tmp_path / "m")
    damage(image)
    with pytest.raises(AssertionError):
        thin_dump(image.path)
    with untouched(image.path) as device, pytest.raises(IntegrityError):
        list(dump(device))


def test_what_thin_check_does_not_look_at(tmp_path: Path) -> None:
    """Counts of data blocks and of mapped blocks: thin_check 0.9 leaves them alone."""
    image = sample(tmp_path / "m")
    details = image.details_root
    image.set_u64(details, image.value_at(details, 0, 24), 1, on_disk.NODE_SALT)
    image.set_bitmap_count(image.data_bitmap(), 2400, 0)
    assert thin_check(image.path)
    kinds = {(found.kind, found.block) for found in check_file(image.path).damages}
    assert (DamageKind.DETAILS, details) in kinds
    assert (DamageKind.DATA_REF_COUNT, 2400) in kinds
