"""The unit and the example of the file: both are what the code says."""

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from devmapper.errors import IntegrityError, PoolMismatch, TransactionConflict, UsageError
from devmapper.server.config import KEYS, Config, with_file

PACKAGING = Path(__file__).parents[2] / "packaging"
EXAMPLE = PACKAGING / "config.toml"
UNIT = PACKAGING / "devmapper.service"


def test_the_example_is_the_default():
    found = with_file(Config(), EXAMPLE)
    assert found == Config()


def test_the_example_shows_every_key_with_its_default(tmp_path):
    lines = EXAMPLE.read_text().splitlines()
    whole = tmp_path / "whole.toml"
    # What is commented out is written without a blank after the #
    whole.write_text("\n".join(line.removeprefix("#") for line in lines if line[:2] != "# "))
    tree = tomllib.loads(whole.read_text())
    found = with_file(Config(), whole)
    names = {name for name, value in tree.items() if not isinstance(value, dict)}
    names |= {
        f"{table}.{key}" for table, each in tree.items() if isinstance(each, dict) for key in each
    }
    assert names == {key.name for key in KEYS}
    for key in KEYS:
        if key.name.endswith(".enabled"):
            assert getattr(found, key.attribute) is True
        elif key.name != "control.socket":
            assert getattr(found, key.attribute) == getattr(Config(), key.attribute)


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def test_the_unit_keeps_the_engine_and_its_sockets():
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["RuntimeDirectoryMode"] == "0700"
    assert {"docker.service", "containerd.service"} <= set(unit()["Unit"]["Before"].split())
    assert float(service["TimeoutStopSec"]) > Config().stop_time
    assert re.fullmatch(r"/usr/bin/devmapper serve", service["ExecStart"])


def test_the_unit_tries_again_only_what_may_succeed():
    final = {
        kind.exit_code
        for kind in (UsageError, TransactionConflict, PoolMismatch, IntegrityError)
    }  # fmt: skip
    assert set(map(int, unit()["Service"]["RestartPreventExitStatus"].split())) == final


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    # It wants the program to be there
    program = f"{sys.executable} -m devmapper.cli.main serve"
    copy = tmp_path / "devmapper.service"
    copy.write_text(UNIT.read_text().replace("/usr/bin/devmapper serve", program))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True
    )
    complaints = [line for line in done.stderr.splitlines() if "devmapper.service" in line]
    assert complaints == []
