"""Docker's calls on a graph whose engine is a function of this process."""

import pytest

from devmapper.driver import Driver
from devmapper.errors import LayerError
from devmapper.server.docker.calls import Calls
from devmapper.server.docker.transfers import Transfers
from devmapper.server.docker.wire import LayerRequest
from tests.support.graphs import open_small
from tests.support.local_engine import LocalEngine

REQUEST = LayerRequest("one")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    monkeypatch.setenv("DEVMAPPER_RUNTIME_DIR", str(tmp_path / "run"))
    with Driver(open_small(tmp_path / "graph", LocalEngine())) as driver:
        yield driver
        driver.cleanup()


@pytest.fixture
def transfers(driver, tmp_path):
    """As the calls have them, to see what they have forgotten."""
    prefix = driver.devices.parts.graph.names.prefix
    return Transfers(tmp_path / "run" / f"{prefix}-transfers")


def break_off(transfers: Transfers) -> None:
    with pytest.raises(KeyError), transfers.into("one"):
        raise KeyError


def test_a_layer_that_was_removed_by_a_request_that_died_can_be_made_and_filled(driver, transfers):
    """SIGKILL between the removal and forgetting the transfer that was broken off before."""
    calls = Calls(driver)
    calls.create(REQUEST)
    break_off(transfers)
    with pytest.raises(LayerError, match="part of another transfer"), transfers.into("one"):
        pass
    driver.remove("one")  # all that the request did
    calls.remove(REQUEST)  # it is repeated
    calls.create(REQUEST)
    with transfers.into("one"):
        pass


def test_a_new_layer_has_nothing_of_an_earlier_one(driver, transfers):
    calls = Calls(driver)
    calls.create(REQUEST)
    break_off(transfers)
    driver.remove("one")  # by somebody else
    calls.create(REQUEST)
    with transfers.into("one"):
        pass
