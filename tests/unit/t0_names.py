"""Names and ids: what is fit to be a layer's id, and what devices are called."""

import os
import re

import pytest

from devmapper.deviceset.names import (
    BASE,
    GraphNames,
    LayerId,
    file_name,
    internal_layer_id,
    layer_id,
    layer_of_file,
    old_device_numbers,
)
from devmapper.errors import UsageError


@pytest.mark.parametrize("text", ["a", "web-init", "x" * 255, "deadbeef" * 8, "ü", "a b", "a.b"])
def test_fit_ids(text):
    assert layer_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/",
        "../x",
        "a\0b",
        "a\nb",
        "x" * 256,
        "ü" * 128,
        "\udcff",
        "base",
        "deviceset-metadata",
        "transaction-metadata",
        "x.migrated",
    ],
)
def test_unfit_ids(text):
    with pytest.raises(UsageError, match="layer id"):
        layer_id(text)


def test_the_empty_string_is_the_base_layer_inside():
    assert internal_layer_id("") == BASE
    assert file_name(BASE) == "base"
    assert layer_of_file("base") == BASE
    assert layer_of_file("web") == "web"


def test_the_prefix_comes_from_the_homes_device_and_inode(tmp_path):
    found = tmp_path.stat()
    major, minor = os.major(found.st_dev), os.minor(found.st_dev)
    names = GraphNames.of(tmp_path)
    assert names.prefix == f"docker-{major}:{minor}-{found.st_ino}"
    assert names.pool == f"{names.prefix}-pool"
    assert names.device(BASE) == f"{names.prefix}-base"
    assert names.device(LayerId("web")) == f"{names.prefix}-web"


def test_device_numbers_are_decoded_as_docker_does():
    assert old_device_numbers(os.makedev(253, 1)) == (253, 1)
    assert old_device_numbers(os.makedev(7, 300)) == (7, 300)


def test_long_ids_get_device_names_that_fit_and_differ():
    names = GraphNames("docker-253:1-17538953")
    one = names.device(LayerId("x" * 255))
    other = names.device(LayerId("x" * 254 + "y"))
    assert one != other
    for name in (one, other, names.device(LayerId("ü" * 127))):
        assert len(os.fsencode(name)) <= 127
        assert name.startswith("docker-253:1-17538953-")
    docker_id = "f" * 64 + "-init"
    assert names.device(LayerId(docker_id)).endswith(docker_id)


def test_ids_that_udev_would_escape_get_device_names_that_it_does_not():
    names = GraphNames("docker-253:1-17538953")
    found = {names.device(LayerId(layer)) for layer in ("a b", "a~b", "a_b", "ü", "ä")}
    assert len(found) == 5
    assert names.device(LayerId("a_b")).endswith("-a_b")
    for name in found:
        assert re.fullmatch(r"docker-253:1-17538953-[A-Za-z0-9#+.:=@_-]+", name)
