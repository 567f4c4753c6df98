"""What is printed for Docker, containerd and Kubernetes, and how their files are read."""

import json
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from devmapper.cli import main
from devmapper.deviceset.id_maps import IdMap
from devmapper.errors import UsageError
from devmapper.server.address import TcpAddress
from devmapper.server.config import Config, with_file
from devmapper.server.snippets import containerd, docker, kubernetes
from devmapper.server.snippets.snippet import Release, installed_release, parse_release
from devmapper.server.snippets.yaml import documents

CONFIG = Config(
    root=Path("/srv/läyers"),
    containerd_enabled=True,
    containerd_socket=Path("/run/x/c.sock"),
    docker_enabled=True,
    docker_socket=Path("/run/docker/plugins/thin.sock"),
)


def file_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file"
    path.write_text(text)
    return path


# containerd


@pytest.mark.parametrize("release", [Release(1, 6), Release(2, 1), None])
def test_containerd_s_tables(tmp_path, release):
    made = containerd.snippet(CONFIG, release, "thin.x")
    tree = tomllib.loads(made.text)
    assert tree["version"] == (2 if release == Release(1, 6) else 3)
    proxy = tree["proxy_plugins"]["thin.x"]
    assert (proxy["type"], proxy["address"]) == ("snapshot", "/run/x/c.sock")
    assert proxy["exports"] == {"root": "/srv/läyers"}
    file = file_of(tmp_path, made.text)
    assert containerd.proxies_at(file, CONFIG.containerd_socket) == ["thin.x"]
    assert containerd.proxies_at(file, Path("/run/other.sock")) == []
    assert containerd.cri_snapshotter(file) == "thin.x"


def test_where_an_older_containerd_lets_a_kubelet_look():
    link = "ln -s '/srv/läyers' /var/lib/containerd/io.containerd.snapshotter.v1.thin.x"
    for release, needed in ((Release(1, 6), True), (Release(2, 1), False), (None, False)):
        notes = containerd.snippet(CONFIG, release, "thin.x").notes
        assert any(note.endswith(link) for note in notes) == needed


def test_what_is_not_served_is_said():
    off = replace(CONFIG, containerd_enabled=False, docker_enabled=False)
    assert "--containerd" in containerd.snippet(off, None).text
    assert "--containerd" not in containerd.snippet(CONFIG, None).text
    assert any("--docker" in note for note in docker.snippet(off, Release(24)).notes)
    assert not any("--docker" in note for note in docker.snippet(CONFIG, Release(24)).notes)


@pytest.mark.parametrize("name", ["devmapper", "overlayfs", "a b", "-a", "a--b", "", "x" * 77, "ü"])
def test_names_that_containerd_refuses(name):
    with pytest.raises(UsageError, match="name "):
        containerd.snippet(CONFIG, None, name)


def test_containerd_s_file_with_imports(tmp_path):
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text(containerd.snippet(CONFIG, Release(2)).text)
    file = file_of(tmp_path, 'version = 3\nimports = ["conf.d/*.toml"]\n')
    assert containerd.proxies_at(file, CONFIG.containerd_socket) == [containerd.NAME]
    assert containerd.cri_snapshotter(file) == containerd.NAME


@pytest.mark.parametrize(
    "text", ["x = ", "proxy_plugins = 3", 'proxy_plugins.a = "b"', "[plugins]"]
)
def test_containerd_s_file_may_be_odd(tmp_path, text):
    file = file_of(tmp_path, text)
    try:
        assert containerd.proxies_at(file, Path("/run/c.sock")) == []
        assert containerd.cri_snapshotter(file) == ""
    except UsageError as err:
        assert "is not TOML" in str(err)  # noqa: PT017
    with pytest.raises(UsageError, match="cannot be read"):
        containerd.proxies_at(tmp_path / "missing", Path("/run/c.sock"))


@pytest.mark.skipif(not shutil.which("containerd"), reason="containerd is not installed")
def test_the_installed_containerd_reads_it(tmp_path):
    release = installed_release("containerd")
    file = file_of(tmp_path, containerd.snippet(CONFIG, release).text)
    done = subprocess.run(
        ["containerd", "--config", str(file), "config", "dump"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    dumped = file_of(tmp_path, done.stdout)
    assert containerd.proxies_at(dumped, CONFIG.containerd_socket) == [containerd.NAME]
    assert containerd.cri_snapshotter(dumped) == containerd.NAME


# Docker


@pytest.mark.parametrize("release", [Release(20, 10), Release(27)])
def test_docker_with_plugins(release):
    made = docker.snippet(CONFIG, release)
    assert json.loads(made.text) == {"experimental": True, "storage-driver": "thin"}
    assert any(docker.VARIABLE in note for note in made.notes) == (release.major == 27)


@pytest.mark.parametrize("release", [Release(28), Release(29), None])
def test_docker_with_snapshotters(release):
    made = docker.snippet(CONFIG, release)
    assert json.loads(made.text) == {
        "features": {"containerd-snapshotter": True},
        "storage-driver": containerd.NAME,
    }


def test_a_plugin_where_docker_does_not_look():
    made = docker.snippet(replace(CONFIG, docker_socket=Path("/srv/x.sock")), Release(24))
    assert any("/etc/docker/plugins/x.spec" in note for note in made.notes)


def test_what_docker_s_file_lacks(tmp_path):
    wanted = docker.members(CONFIG, Release(29))
    file = file_of(tmp_path, json.dumps({**wanted, "debug": True}))
    assert docker.lacking_in(file, wanted) == []
    file = file_of(tmp_path, '{"features": {"other": true}, "storage-driver": "overlay2"}')
    assert len(docker.lacking_in(file, wanted)) == 2
    for text in ("[]", "{", "\udcff".encode(errors="surrogateescape").decode("latin-1")):
        with pytest.raises(UsageError):
            docker.lacking_in(file_of(tmp_path, text), wanted)


# Kubernetes


def test_the_manifest(tmp_path):
    made = kubernetes.snippet(replace(CONFIG, id_maps=(IdMap(0, 1, 2),)), "registry/x:1")
    config_map, daemon_set = yaml.safe_load_all(made.text)
    assert "namespace" not in made.text
    read = with_file(Config(), file_of(tmp_path, config_map["data"]["config.toml"]))
    assert (read.root, read.engine, read.containerd_enabled) == (CONFIG.root, "kernel", True)
    assert read.metrics_address == TcpAddress("0.0.0.0", 9273)
    pod = daemon_set["spec"]["template"]["spec"]
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]
    assert daemon_set["spec"]["selector"]["matchLabels"] == labels
    (container,) = pod["containers"]
    assert container["image"] == "registry/x:1"
    assert container["securityContext"] == {"privileged": True}
    mounts = {each["name"]: each for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    for name, volume in volumes.items():
        if "hostPath" in volume:
            assert volume["hostPath"]["path"] == mounts[name]["mountPath"]
    assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert mounts["graph"]["mountPath"] == str(CONFIG.root)
    assert mounts["graph"]["mountPropagation"] == "Bidirectional"
    places = [each["mountPath"] for each in container["volumeMounts"]]
    assert str(CONFIG.containerd_socket.parent) in places
    assert len(set(places)) == len(places)
    assert pod["terminationGracePeriodSeconds"] > CONFIG.stop_time


def test_the_embedded_engine_is_not_for_a_pod():
    made = kubernetes.snippet(replace(CONFIG, engine="embedded"))
    assert any("embedded" in note for note in made.notes)
    assert 'engine = "kernel"' in made.text


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": {}, "b": [], "c": ""},
        {"yes": "no", "n": "1", "t": True, "i": -3, "~": "~", "a: b": "# c"},
        [["x", ["y"]], {"k": [{"l": "m\nn\n"}]}],
        {"text": "first\n\n  indented\n# no comment\n"},
        'ü\t"\\',
    ],
)
def test_yaml_is_read_as_it_was_meant(value):
    assert yaml.safe_load(documents([value])) == value


# The command


@pytest.mark.parametrize(
    ("text", "release"), [("27", (27, 0)), ("1.6.20", (1, 6)), ("v2.1", (2, 1))]
)
def test_releases(text, release):
    assert parse_release(text) == release


@pytest.mark.parametrize("text", ["", "x", "1.", "27 ", "-1", "99999", "1.6~ds1"])
def test_no_releases(text):
    with pytest.raises(UsageError, match="release"):
        parse_release(text)


def test_programs_that_say_nothing():
    assert installed_release("no-such-program") is None
    assert installed_release("false") is None


@pytest.mark.parametrize("words", [("containerd",), ("docker",), ("kubernetes",)])
def test_only_the_snippet_is_on_stdout(words, capsys):
    assert main.run(["config", *words]) == 0
    told = capsys.readouterr()
    readers: dict[str, Any] = {
        "containerd": tomllib.loads,
        "docker": json.loads,
        "kubernetes": lambda text: list(yaml.safe_load_all(text)),
    }
    assert readers[words[0]](told.out)
    assert all(line.startswith("note: ") for line in told.err.splitlines())
    assert main.run(["--json", "config", *words]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value.keys() == {"file", "text", "notes"}
