"""A real Prometheus with our alert rules, on a loopback port that the kernel chooses."""

import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.support.waiting import PATIENCE, wait_for

ALERTS: Final = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"
JOB: Final = "devmapper"
_LISTENS: Final = re.compile(r'msg="Listening on" address=127\.0\.0\.1:(\d+)')
_CONFIG: Final = """\
global: {{ scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 200ms }}
rule_files: [ {rules} ]
scrape_configs:
  - job_name: {job}
    static_configs: [ {{ targets: {targets} }} ]
"""


class Series(NamedTuple):
    """One element of an instant vector."""

    labels: dict[str, str]
    value: float


class Prometheus:
    """One that runs and answers."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}/api/v1/"

    def query(self, expression: str) -> list[Series]:
        """What an expression is now; it has to be a vector."""
        found = self.get("query", query=expression)
        assert found["resultType"] == "vector", expression
        return [Series(each["metric"], float(each["value"][1])) for each in found["result"]]

    def value(self, expression: str) -> float | None:
        """The value of the only series, if there is one."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return found[0].value if found else None

    def alerts(self) -> set[tuple[str, str, str]]:
        """Instance, name and state of each alert that is pending or fires."""
        return {
            (alert["labels"]["instance"], alert["labels"]["alertname"], alert["state"])
            for alert in self.get("alerts")["alerts"]
        }

    def get(self, what: str, **parameters: str) -> Any:
        """The member `data` of an answer."""
        url = f"{self._base}{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                body = json.load(answer)
        except urllib.error.HTTPError as err:
            raise AssertionError(f"{what} {parameters}: {err.read().decode()}") from err
        assert body["status"] == "success", body
        return body["data"]


@contextmanager
def prometheus(folder: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """One that scrapes *targets*, five seconds after its start at the earliest.

    All that it writes is in *folder*, which is made.
    """
    folder.mkdir()
    config, log = folder / "prometheus.yml", folder / "log"
    config.write_text(
        _CONFIG.format(rules=json.dumps(str(ALERTS)), job=JOB, targets=json.dumps(list(targets)))
    )
    argv = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0", "--storage.tsdb.retention.time=1h",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder
        )
    try:
        yield Prometheus(_port(process, log))
    except BaseException:
        print(log.read_text())
        raise
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """The port that it listens on, once it answers questions."""
    found: list[str] = []

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        text = log.read_text()
        found[:] = _LISTENS.findall(text)
        return bool(found) and "Server is ready to receive web requests" in text

    wait_for(listens, log.read_text)
    return int(found[0])


def promtool(*arguments: object, stdin: bytes = b"") -> str:
    """What it says, with nothing to complain of."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)], input=stdin, capture_output=True, timeout=PATIENCE
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said
