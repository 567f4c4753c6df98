"""Who uses a mount, counted by more than one process."""

import os
from collections import Counter

import pytest

from devmapper.deviceset.names import LayerId
from devmapper.deviceset.users import SOMEBODY, Users

ONE = LayerId("one")


@pytest.fixture
def places(tmp_path):
    """Two processes' views of one graph."""
    return Users(tmp_path / "users"), Users(tmp_path / "users")


def test_who_is_counted_by_another_process_is_counted(places):
    daemon, command = places
    daemon.set(ONE, Counter({"docker": 1}))
    command.set(ONE, command.of(ONE) + Counter({"cli": 1}))
    assert daemon.of(ONE) == {"docker": 1, "cli": 1}
    daemon.set(ONE, Counter({"cli": 1}))
    assert command.of(ONE) == {"cli": 1}
    assert command.layers_of("docker") == []


def test_who_has_no_name_counts_in_his_own_process_alone(places):
    one, other = places
    one.set(ONE, Counter({SOMEBODY: 2, "docker": 1}))
    assert one.of(ONE) == {SOMEBODY: 2, "docker": 1}
    assert other.of(ONE) == {"docker": 1}


def test_a_mount_that_nobody_is_known_for_has_somebody(places):
    one, other = places
    assert one.of(ONE) == {SOMEBODY: 1}
    one.set(ONE, Counter({"docker": 1}))
    other.drop(ONE)
    assert one.of(ONE) == {SOMEBODY: 1}


def test_nothing_stays_of_a_layer_that_is_not_mounted(places, tmp_path):
    one, other = places
    one.set(ONE, Counter({SOMEBODY: 1}))
    other.set(ONE, Counter({"docker": 1}))
    one.drop(ONE)
    assert list((tmp_path / "users").iterdir()) == []


def test_what_killed_processes_have_left_goes(places, tmp_path):
    users, _ = places
    for layer in (ONE, LayerId("two")):
        users.set(layer, Counter({"docker": 1}))
    for name in (f".tmp-{os.getpid()}-one", ".tmp-99999999-one"):
        (tmp_path / "users" / name).touch()
    users.tidy()
    left = {path.name for path in (tmp_path / "users").iterdir()}
    assert left == {"one", "two", f".tmp-{os.getpid()}-one"}
    assert users.layers() == [ONE, LayerId("two")]
