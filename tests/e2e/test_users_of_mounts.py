"""Users of mounts that have names, counted by several real processes at the same time."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import devmapper
from devmapper.deviceset.names import LayerId
from devmapper.engine.runtime import runtime_base
from devmapper.linux import mount
from tests.support.command import SMALL, commands
from tests.support.users_churn import CONTENT

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.e2e]

LAYERS = ("one", "two")
ROUNDS = 40
FOREVER = 10**6
SECONDS = 120.0


class Churner:
    """A process of `tests.support.users_churn`, and what it has said."""

    def __init__(self, home: Path, user: str, log: Path, rounds: int = ROUNDS) -> None:
        self.user = user
        self._log = log
        argv = [
            sys.executable, "-m", "tests.support.users_churn", str(home), "embedded", user,
            str(rounds), *LAYERS,
        ]  # fmt: skip
        with log.open("wb") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT)

    def steps(self) -> list[list[str]]:
        return [line.split() for line in self._log.read_text().splitlines()]

    def kill_after(self, steps: int) -> None:
        while len(self.steps()) < steps and self.process.poll() is None:
            time.sleep(0.002)
        assert self.process.poll() is None, self._log.read_text()
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        assert self.process.wait(SECONDS) == 0, self._log.read_text()

    def may_use(self, layer: str) -> set[int]:
        """How often it may be counted for *layer*, by its last words."""
        mine = [step for step in self.steps() if step[:1] == [layer] and len(step) >= 3]
        if not mine:
            return {0}
        _, before, after, *done = mine[-1]
        return {int(after)} if done else {int(before), int(after)}


def test_users_of_several_processes_are_counted_rightly_through_kills(tmp_path):
    home = tmp_path / "graph"
    with commands(home) as command:
        command.engine = "embedded"
        for layer in LAYERS:
            command("create", layer)
            root = Path(command("get", layer).text.rstrip("\n"))
            (root / CONTENT).write_text(layer)
            command("put", layer)
        churners = [Churner(home, f"user{n}", tmp_path / f"log{n}", FOREVER) for n in range(3)]
        try:
            for n in range(3, 6):
                churners[n - 3].kill_after(10 + 7 * n)
                churners.append(Churner(home, f"user{n}", tmp_path / f"log{n}"))
            for churner in churners[3:]:
                churner.end()
        finally:
            for churner in churners:
                churner.process.kill()
                churner.process.wait()
        with devmapper.init(home, SMALL, engine="embedded") as driver:
            mounts = driver.devices.parts.mounts
            for layer in map(LayerId, LAYERS):
                users = mounts.users(layer)
                for churner in churners:
                    assert users.get(churner.user, 0) in churner.may_use(layer), (layer, users)
                names = {name for name in users if name}
                assert names <= {churner.user for churner in churners}
                place = mounts.mount_point(layer)
                for user, number in sorted(users.items()):
                    for _ in range(number):
                        assert place is not None
                        assert mount.is_mount_point(place)
                        driver.put(layer, user=user)
                assert mounts.mount_point(layer) is None
        assert not [path for path in runtime_base().glob("*-users/*") if path.name[0] != "."]
