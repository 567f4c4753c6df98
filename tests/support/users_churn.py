"""A process of ours that mounts and unmounts layers as a user with a name, others beside it.

`python -m tests.support.users_churn HOME ENGINE USER ROUNDS LAYER ...` prints a line before each
`get` and `put`, `LAYER FROM TO`, and the same with `=` behind it: how often it uses the layer.  It
ends with what it has got then, and with an assertion if somebody else has changed that meanwhile.
"""

import random
import sys
from pathlib import Path

import devmapper
from devmapper.cli.settings import preference
from devmapper.deviceset.names import LayerId
from tests.support.command import SMALL

CONTENT = "content"
_MOST = 3


def main() -> None:
    home, engine, user, rounds, *layers = sys.argv[1:]
    driver = devmapper.init(home, SMALL, engine=preference(engine))
    choice = random.Random(user)
    counts = dict.fromkeys(layers, 0)
    mounts = driver.devices.parts.mounts
    for _ in range(int(rounds)):
        layer = choice.choice(layers)
        before = counts[layer]
        after = before + (1 if before == 0 or (before < _MOST and choice.random() < 0.4) else -1)
        print(layer, before, after, flush=True)
        if after > before:
            driver.get(layer, user=user)
        else:
            driver.put(layer, user=user)
        counts[layer] = after
        found = mounts.users(LayerId(layer)).get(user, 0)
        assert found == after, (layer, user, found, after)
        if after:
            assert (Path(home) / "mnt" / layer / "rootfs" / CONTENT).read_text() == layer
        print(layer, before, after, "=", flush=True)
    driver.close()


if __name__ == "__main__":
    main()
