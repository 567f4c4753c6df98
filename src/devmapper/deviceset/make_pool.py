"""Making the pool of a graph that is still to be: what `devmapper pool create` does."""

from pathlib import Path

from devmapper.deviceset import direct_lvm
from devmapper.deviceset.lock import GraphLock
from devmapper.deviceset.options import Options
from devmapper.deviceset.records import RecordStore
from devmapper.deviceset.requirements import check_engine
from devmapper.deviceset.setup_config import POOL_NAME, with_given_pool
from devmapper.engine.port import Engine


def make_pool(home: Path, options: Options, engine: Engine) -> tuple[str, bool]:
    """Make a disk the pool of the graph in *home*; its name, and whether it was made now.

    The base layer is made by the first start on it.  Errors as `direct_lvm.set_up`.
    """
    check_engine(engine.features(), with_given_pool(home, options))
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with GraphLock(home).hold():
        store = RecordStore(home / "metadata")
        store.prepare()
        made = direct_lvm.set_up(
            home, options, has_layers=lambda: any(True for _ in store.layers())
        )
    return POOL_NAME, made
