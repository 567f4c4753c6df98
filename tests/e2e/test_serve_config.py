"""`devmapper config … --check` beside a real daemon."""

import json
from pathlib import Path

import pytest

from devmapper.server.config import Config
from devmapper.server.snippets import containerd, docker
from devmapper.server.snippets.snippet import Release
from tests.support.command import Ended
from tests.support.daemon import Daemon, served

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]


@pytest.fixture
def daemon(tmp_path):
    with served(tmp_path, docker=True, containerd=True) as running:
        yield running


def check(daemon: Daemon, *words: str) -> Ended:
    """The command with a file that names the daemon's sockets."""
    file = daemon.home.parent / "serve.toml"
    file.write_text(
        f'[docker]\nsocket = "{daemon.docker}"\n[containerd]\nsocket = "{daemon.containerd}"\n'
    )
    return daemon.command.run("config", *words, "--check", "--config", file)


def theirs(tmp_path: Path, text: str) -> str:
    path = tmp_path / "theirs"
    path.write_text(text)
    return str(path)


def test_what_works_is_ok(daemon, tmp_path):
    mine = Config(docker_socket=daemon.docker, containerd_socket=daemon.containerd)
    file = theirs(tmp_path, containerd.snippet(mine, None).text)
    for command in ("containerd", "kubernetes"):
        done = check(daemon, command, "--file", file)
        assert (done.status, done.err) == (0, ""), done
        assert all(line.startswith("ok ") for line in done.text.splitlines())
        assert "scratch snapshot" in done.text
    file = theirs(tmp_path, docker.snippet(mine, Release(24)).text)
    done = check(daemon, "docker", "--release", "24", "--file", file)
    assert (done.status, done.err) == (0, ""), done
    assert "scratch layer" in done.text
    # Nothing is left of what was tried
    assert [
        each["id"] for each in daemon.command("--json", "ls").json if "check" in each["id"]
    ] == []


def test_what_the_other_side_lacks_is_said(daemon, tmp_path):
    done = check(daemon, "containerd", "--file", theirs(tmp_path, "version = 2\n"))
    assert done.status == 1
    failed = [line for line in done.text.splitlines() if line.startswith("failed")]
    assert len(failed) == 1
    assert "has no proxy plugin of type snapshot" in failed[0]
    done = check(daemon, "docker", "--release", "24", "--file", theirs(tmp_path, "{}"))
    assert done.status == 1
    assert '"experimental": true' in done.text
    done = check(daemon, "docker", "--release", "24", "--file", "/nonexistent")
    assert done.status == 1
    assert "cannot be read" in done.text


def test_a_daemon_that_does_not_run_or_serve(daemon, tmp_path):
    daemon.kill()  # its sockets stay
    for command in ("containerd", "docker", "kubernetes"):
        done = check(daemon, command, "--file", theirs(tmp_path, "{}"))
        assert done.status == 1
        assert done.text.startswith("failed  daemon: no daemon has the graph")
        assert "Traceback" not in done.err
    daemon.start()
    daemon.docker.unlink()
    done = check(daemon, "docker", "--release", "24", "--file", theirs(tmp_path, "{}"))
    assert "failed  socket" in done.text
    assert "--docker" in done.text
    daemon.docker.touch()
    assert "is no socket" in check(daemon, "docker", "--release", "24").text
    daemon.docker.unlink()


def test_json_has_every_step(daemon, tmp_path):
    file = daemon.home.parent / "serve.toml"
    file.write_text(f'[containerd]\nsocket = "{daemon.containerd}"\n')
    done = daemon.command.run(
        "--json", "config", "containerd", "--check", "--config", file, "--file", "/nonexistent"
    )
    assert done.status == 1
    value = json.loads(done.out)
    assert value["ok"] is False
    assert [step["what"] for step in value["steps"]] == [
        "daemon", "socket", "answer", "scratch snapshot", "containerd's file",
    ]  # fmt: skip
    assert [step["ok"] for step in value["steps"]] == [True] * 4 + [False]
