"""A process of ours that makes, fills and removes layers until it is killed.

`python -m tests.support.layer_churn HOME PARENT ENGINE` prints the id of each layer that it has
made whole and means to keep, and its own first word when it begins.
"""

import itertools
import os
import sys
from pathlib import Path

import devmapper
from devmapper.cli.settings import preference
from tests.support.docker_graph import OPTIONS

READY = "ready"
CONTENT = b"whole" * 1000


def main() -> None:
    home, parent, engine = sys.argv[1:]
    driver = devmapper.init(home, OPTIONS, engine=preference(engine))
    print(READY, flush=True)
    for number in itertools.count():
        layer = f"churn-{os.getpid()}-{number}"
        driver.create(layer, parent)
        (Path(driver.get(layer)) / "content").write_bytes(CONTENT)
        if number % 2:
            driver.put(layer)
        if number % 3:
            print(layer, flush=True)
            continue
        if not number % 2:
            driver.put(layer)
        driver.remove(layer)


if __name__ == "__main__":
    main()
