"""Maps of a user namespace: what is refused, and who is root."""

import pytest

from devmapper.deviceset.id_maps import (
    ROOT,
    IdMap,
    Owner,
    canonical,
    container_root,
    parse_id_map,
    show_maps,
)
from devmapper.errors import UsageError


def test_the_root_of_the_container():
    assert container_root([], []) == ROOT
    assert container_root([IdMap(0, 100000, 65536)], [IdMap(0, 200000, 65536)]) == Owner(
        100000, 200000
    )
    several = [IdMap(1000, 5000, 10), IdMap(1, 100001, 999), IdMap(0, 1000, 1)]
    assert container_root(several, []) == Owner(1000, 0)
    assert container_root([IdMap(0, 0, 2**32 - 1)], []) == ROOT


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ([IdMap(1, 100000, 65536)], "no root"),
        ([IdMap(0, 100000, 0)], "size 0"),
        ([IdMap(0, 100000, -5)], "size -5"),
        ([IdMap(-1, 100000, 5)], "range of ids"),
        ([IdMap(0, -1, 5)], "range of ids"),
        ([IdMap(0, 2**32 - 2, 2)], "range of ids"),
        ([IdMap(0, 1000, 10), IdMap(9, 5000, 10)], "overlap in their container ids"),
        ([IdMap(0, 1000, 10), IdMap(50, 995, 6)], "overlap in their host ids"),
    ],
)
def test_maps_that_are_wrong_are_refused(maps, words):
    with pytest.raises(UsageError, match=f"uid map.*{words}"):
        container_root(maps, [])
    with pytest.raises(UsageError, match=f"gid map.*{words}"):
        container_root([], maps)


def test_a_map_is_read_from_three_numbers():
    assert parse_id_map("0:100000:65536") == IdMap(0, 100000, 65536)
    for text in ("", "0:1", "0:1:2:3", "0:-1:2", "0: 1:2", "a:b:c", "0:1:" + "9" * 5000, "0:٣:1"):
        with pytest.raises(UsageError, match="id map"):
            parse_id_map(text)


def test_one_map_has_one_spelling():
    assert canonical([]) == canonical([IdMap(0, 0, 2**32 - 1)]) == ()
    assert canonical([IdMap(0, 0, 65536)]) == (IdMap(0, 0, 65536),)
    parts = [IdMap(10, 1010, 5), IdMap(0, 1000, 10), IdMap(15, 2015, 1)]
    assert canonical(parts) == (IdMap(0, 1000, 15), IdMap(15, 2015, 1))
    assert canonical(iter(parts)) == canonical(canonical(parts))
    assert show_maps(parts) == "0:1000:15, 15:2015:1"
    assert show_maps([]) == "no id maps"
