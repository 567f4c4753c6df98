"""The daemon's configuration: every key, every wrong type, and who wins."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from devmapper.cli import main
from devmapper.deviceset.id_maps import IdMap
from devmapper.errors import UsageError
from devmapper.server.address import TcpAddress, parse_address, show_address
from devmapper.server.config import (
    KEYS,
    Config,
    LogLevel,
    OnStop,
    read_file,
    to_toml,
    with_file,
    with_options,
)

GOOD: dict[str, tuple[Any, Any]] = {  # key: what the file says, what it means
    "root": ("/srv/layers", Path("/srv/layers")),
    "engine": ("kernel", "kernel"),
    "storage-opts": (["dm.basesize=20G", "dm.fs=xfs"], ("dm.basesize=20G", "dm.fs=xfs")),
    "id-maps": (["0:100000:65536"], (IdMap(0, 100000, 65536),)),
    "log-level": ("debug", LogLevel.DEBUG),
    "log-format": ("journal", "journal"),
    "on-stop": ("release", OnStop.RELEASE),
    "stop-time": ("1.5m", 90.0),
    "control.socket": ("/run/c.sock", Path("/run/c.sock")),
    "docker.enabled": (True, True),
    "docker.socket": ("/run/d.sock", Path("/run/d.sock")),
    "containerd.enabled": (True, True),
    "containerd.socket": ("/run/t.sock", Path("/run/t.sock")),
    "metrics.enabled": (True, True),
    "metrics.address": ("[::1]:9000", TcpAddress("::1", 9000)),
    "metrics.max-layers": (0, 0),
    "metrics.layers-interval": ("1h", 3600.0),
    "watch.enabled": (False, False),
    "watch.interval": ("250ms", 0.25),
    "watch.data-low-water": (12.5, 12.5),
    "watch.metadata-low-water": (0, 0.0),
}
BAD: dict[str, list[Any]] = {  # values of the right type that mean nothing
    "root": ["", "relative", "/a\0b"],
    "engine": ["", "steam", "AUTO"],
    "storage-opts": [["dm.basesize"], ["dm.unknown=1"], [""], [3]],
    "id-maps": [["0:1"], ["1:100000:65536"], [True]],
    "log-level": ["loud", "INFO"],
    "log-format": ["json"],
    "on-stop": ["hold"],
    "stop-time": ["", "10", "-1s", "1d", "25h", "1e3s", "٣s"],
    "control.socket": ["", "c.sock", "/" + "x" * 100],
    "docker.enabled": ["yes"],
    "docker.socket": ["d.sock", "/a\0"],
    "containerd.enabled": [1],
    "containerd.socket": ["unix:/run/t.sock"],
    "metrics.enabled": ["on"],
    "metrics.address": ["9273", ":9273", "host:", "host:99999", "::1:9273", "unix:rel", "h:1 "],
    "metrics.max-layers": [-1, 1_000_001, 1.5, True],
    "metrics.layers-interval": ["1"],
    "watch.enabled": [0],
    "watch.interval": ["0s", "10"],
    "watch.data-low-water": [-1, 101, True, float("nan")],
    "watch.metadata-low-water": ["10"],
}
WRONG_TYPES = [True, 3, 2.5, "word", ["word"], [[]], {"a": 1}]


def file_of(tmp_path: Path, name: str, value: object) -> Path:
    """A file with one key, written as TOML by hand."""
    table, _, key = name.rpartition(".")
    path = tmp_path / "config.toml"
    path.write_text((f"[{table}]\n" if table else "") + f"{key} = {toml(value)}\n")
    return path


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, str):
        return '"' + value.replace("\0", "\\u0000") + '"'
    return str(value)


def test_the_table_of_keys_is_the_configuration():
    assert [key.name for key in KEYS] == list(GOOD) == list(BAD)
    assert [key.attribute for key in KEYS] == [field.name for field in fields(Config)]


@pytest.mark.parametrize("name", GOOD)
def test_every_key_of_the_file(tmp_path, name):
    written, meant = GOOD[name]
    found = with_file(Config(), file_of(tmp_path, name, written))
    assert getattr(found, name.replace(".", "_").replace("-", "_")) == meant
    assert with_options(Config(), {name: written}) == found
    assert with_file(Config(), _write(tmp_path, to_toml(found))) == found


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "again.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", GOOD)
def test_every_wrong_type_is_named_with_file_key_and_what_is_expected(tmp_path, name):
    right = GOOD[name][0]
    for wrong in WRONG_TYPES:
        if type(wrong) is type(right) or {type(wrong), type(right)} <= {int, float}:
            continue
        path = file_of(tmp_path, name, wrong)
        with pytest.raises(UsageError) as raised:
            with_file(Config(), path)
        message = str(raised.value)
        assert message.startswith(f"config file {str(path)!r}: {name} is "), message
        assert ", expected " in message
        assert "\n" not in message


@pytest.mark.parametrize(("name", "value"), [(name, each) for name in BAD for each in BAD[name]])
def test_values_that_mean_nothing(tmp_path, name, value):
    path = file_of(tmp_path, name, value)
    with pytest.raises(UsageError, match=name) as raised:
        with_file(Config(), path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="option --"):
        with_options(Config(), {name: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rood = 1", "rood is unknown"),
        ("[podman]", "podman is unknown"),
        ("[docker]\nsokket = 'x'", "docker.sokket is unknown"),
        ("docker = true", r"docker is true, expected a table \[docker\]"),
        ("docker.enabled.x = true", "docker.enabled is"),
        ("'docker.socket' = '/run/x.sock'", "docker.socket"),
        ("root = ", "is not TOML"),
        ("root = '/a'\nroot = '/b'", "is not TOML"),
        ("a = " + "[" * 5000, "is not TOML"),
        ("# " + "x" * (1 << 20), "has more than"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, words):
    with pytest.raises(UsageError, match=words) as raised:
        with_file(Config(), _write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_file(path)
    (tmp_path / "latin").write_bytes(b"root = '/\xff'")
    with pytest.raises(UsageError, match="is not TOML"):
        read_file(tmp_path / "latin")


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(UsageError, match="option --root is"):
        with_options(Config(), {"root": "/srv/\udcff"})


def test_a_table_that_is_there_is_served_unless_it_says_no(tmp_path):
    def read(text: str) -> Config:
        return with_file(Config(), _write(tmp_path, text))

    assert not read("").docker_enabled
    assert read("[docker]").docker_enabled
    assert not read("[docker]\nenabled = false").docker_enabled
    assert read("[metrics]\naddress = 'unix:/run/m.sock'").metrics_enabled
    assert not read("[watch]\nenabled = false").watch_enabled


def test_the_command_line_wins(tmp_path):
    found = with_file(Config(), _write(tmp_path, "log-level = 'error'\n[docker]\n[containerd]"))
    found = with_options(found, {"log-level": "debug", "docker.enabled": False})
    assert (found.log_level, found.docker_enabled, found.containerd_enabled) == (
        LogLevel.DEBUG,
        False,
        True,
    )
    assert with_options(Config(), {"docker.socket": "/run/x.sock"}).docker_enabled


def test_what_is_printed_is_what_is_read(tmp_path):
    odd = Config(root=Path('/sröv/"a"\\b\x7f\t'), storage_opts=("dm.mkfsarg=-L 'x'",))
    assert with_file(Config(), _write(tmp_path, to_toml(odd))) == odd
    assert tomllib.loads(to_toml(Config()))["stop-time"] == "30s"


def test_every_key_is_an_option():
    command = typer.main.get_command(main.app)
    options = {
        option
        for parameter in command.commands["serve"].params  # type: ignore[attr-defined]
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for key in KEYS:
        assert key.option in options
        if key.name.endswith(".enabled"):
            assert f"--no-{key.option[2:]}" in options


@pytest.mark.parametrize("text", ["127.0.0.1:9273", "[::1]:0", "host:65535", "unix:/run/x"])
def test_addresses_are_shown_as_they_are_read(text):
    assert show_address(parse_address(text)) == text


def test_options_before_the_command_and_the_file(tmp_path, capsys, monkeypatch):
    path = _write(tmp_path, 'root = "/srv/file"\nengine = "kernel"\nlog-level = "error"\n')

    def effective(*words: str) -> dict[str, Any]:
        assert main.run([*words, "--config", str(path), "--print-config"]) == 0
        return tomllib.loads(capsys.readouterr().out)

    assert effective("serve")["root"] == "/srv/file"
    assert effective("--root", "/srv/line", "serve")["root"] == "/srv/line"
    assert effective("--engine", "auto", "serve")["engine"] == "auto"
    assert effective("--root", "/srv/line", "serve", "--root", "/srv/last")["root"] == "/srv/last"
    two = effective("serve", "--storage-opt=dm.fs=xfs", "--storage-opt=dm.basesize=1G")
    assert two["storage-opts"] == ["dm.fs=xfs", "dm.basesize=1G"]
    assert effective("-vv", "serve")["log-level"] == "debug"
    assert effective("-v", "serve", "--log-level", "warning")["log-level"] == "warning"
    monkeypatch.setenv("DEVMAPPER_ROOT", "/srv/env")
    assert effective("serve")["root"] == "/srv/env"
