"""Sizes as people type and read them, and ids where they enter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmapper import errors, units


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("512", 512), ("64K", 65536), ("10g", 10 * 1024**3), ("2GB", 2 * 1024**3),
     ("1t", 1024**4), ("3Pb", 3 * 1024**5), ("7b", 7),
     # what go-units of Docker 20.10 reads as well
     ("1.5G", 3 * 1024**3 // 2), ("10 G", 10 * 1024**3), ("64KiB", 65536), ("2 mi", 2 * 1024**2),
     ("0.3", 0), ("0.1k", 102), ("1.0000000000000000001p", 1024**5)],
)  # fmt: skip
def test_sizes_as_docker_reads_them(text, value):
    assert units.parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 1",
        "-1",
        "1.G",
        ".5G",
        "1.2.3",
        "G",
        "1  K",
        "1K b",
        "1ib",
        "1e3",
        "٣K",
        "9" * 30,
        "9" * 5000,
    ],
)
def test_bad_sizes_are_refused_by_name(text):
    with pytest.raises(errors.UsageError, match="size"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(65536, "65.54 kB"), (107374182400, "107.4 GB"), (2147483648, "2.147 GB"), (0, "0 B"),
     (999, "999 B"), (1000, "1 kB")],
)  # fmt: skip
def test_sizes_as_docker_info_prints_them(value, text):
    assert units.human_size(value) == text


@given(st.integers(0, 2**63 - 1))
def test_every_size_can_be_said(value):
    assert units.human_size(value)


@pytest.mark.parametrize("value", [-1, 2**24, 2**63])
def test_thin_ids_have_24_bits(value):
    with pytest.raises(errors.UsageError, match=str(value)):
        units.thin_id(value)


@pytest.mark.parametrize("value", [0, 512, 65535, 65537, 96 * 1024, 2 * 1024**3])
def test_block_sizes_the_format_does_not_allow(value):
    with pytest.raises(errors.UsageError, match="block size"):
        units.data_block_size(value)


@pytest.mark.parametrize("value", [64 * 1024, 192 * 1024, 1024**3])
def test_block_sizes_the_format_allows(value):
    assert units.data_block_size(value) == value
