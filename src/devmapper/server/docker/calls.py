"""The calls of the protocol, one method each, on the driver: what a layer is to Docker.

Docker sees its own layers and those that belong to nobody, such as a graph that Docker itself has
written; containerd's do not exist for it.  The graph is shared, so that nothing here opens or ends
it.  Methods block, may be called from any thread, and raise what the driver raises.
"""

import logging
from collections.abc import Mapping
from typing import BinaryIO, Final

from devmapper.deviceset.leaving import begin_again, leave, leave_all
from devmapper.deviceset.names import LayerId, layer_id
from devmapper.deviceset.owners import DOCKER, owner_of
from devmapper.driver import Driver
from devmapper.engine.runtime import runtime_base
from devmapper.errors import LayerNotFound, LayerNotMounted
from devmapper.server.docker.agreement import check_agreement
from devmapper.server.docker.transfers import Transfers
from devmapper.server.docker.wire import InitRequest, LayerRequest, encode

log = logging.getLogger(__name__)

Reply = Mapping[str, object]

NOTHING: Final[Reply] = {}
_VISIBLE: Final = frozenset({"", DOCKER})


class Calls:
    """The graph driver as Docker's plugin protocol has it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        graph = driver.devices.parts.graph
        self._store = graph.store
        self._transfers = Transfers(runtime_base() / f"{graph.names.prefix}-transfers")

    def activate(self, _request: LayerRequest) -> Reply:
        return {"Implements": ["GraphDriver"]}

    def capabilities(self, _request: LayerRequest) -> Reply:
        """Not exact: Docker keeps what it needs to make the same tar again (tar-split)."""
        return {"Capabilities": {"ReproducesExactDiffs": False}}

    def init(self, request: InitRequest) -> Reply:
        """A dockerd begins.  Its home is its own affair: layers live in the daemon's graph."""
        check_agreement(request, self._driver)
        log.info("dockerd begins, with home %r; layers are in %s", request.home, self._driver.home)
        begin_again(self._driver.devices, DOCKER)
        return NOTHING

    def cleanup(self, _request: LayerRequest) -> Reply:
        """A dockerd ends: what it has mounted goes.  The graph stays, others may use it."""
        leave_all(self._driver.devices, DOCKER)
        return NOTHING

    def create(self, request: LayerRequest) -> Reply:
        """Create and CreateReadWrite: each of our layers can be written to."""
        if request.parent:
            self._must_exist(request.parent)
        self._driver.create(
            request.id,
            request.parent,
            mount_label=request.mount_label,
            storage_opt=request.storage_opt,
            owner=DOCKER,
        )
        self._transfers.forget(request.id)  # into an earlier layer of this id
        return NOTHING

    def remove(self, request: LayerRequest) -> Reply:
        """One that is missing is removed already.

        What Docker itself still counts as mounted is a use that a dockerd before it has not ended.
        """
        layer = self._visible(request.id)
        if layer is not None:
            leave(self._driver.devices, layer, DOCKER)
            self._driver.remove(layer)
        # Also of one that a request has removed which did not live to say so
        self._transfers.forget(request.id)
        return NOTHING

    def get(self, request: LayerRequest) -> Reply:
        layer = self._must_exist(request.id)
        return {"Dir": self._driver.get(layer, request.mount_label, user=DOCKER)}

    def put(self, request: LayerRequest) -> Reply:
        """Docker puts what it has not got, such as after its restart: that is no error."""
        layer = self._must_exist(request.id)
        try:
            self._driver.put(layer, user=DOCKER)
        except LayerNotMounted:
            log.debug("layer %r is not mounted", layer)
        return NOTHING

    def exists(self, request: LayerRequest) -> Reply:
        return {"Exists": self._visible(request.id) is not None}

    def status(self, _request: LayerRequest) -> Reply:
        return {"Status": self._driver.status()}

    def get_metadata(self, request: LayerRequest) -> Reply:
        return {"Metadata": self._driver.get_metadata(self._must_exist(request.id))}

    def changes(self, request: LayerRequest, out: BinaryIO) -> None:
        """Write the reply as the changes are found; before an error it is not a whole one."""
        with self._driver.each_change(*self._pair(request)) as found:
            out.write(b'{"Changes": [')
            comma = b""
            for path, kind in found:
                out.write(comma + encode({"Path": path, "Kind": kind}))
                comma = b", "
            out.write(b"]}")

    def diff_size(self, request: LayerRequest) -> Reply:
        return {"Size": self._driver.diff_size(*self._pair(request))}

    def diff(self, request: LayerRequest, out: BinaryIO) -> None:
        """Write the tar; what was written before an error is not a whole one."""
        layer, parent = self._pair(request)
        self._driver.write_diff(layer, parent, out)

    def apply_diff(self, request: LayerRequest, stream: BinaryIO) -> Reply:
        """Unpack a tar; after an error the layer takes no other one."""
        layer, parent = self._pair(request)
        with self._transfers.into(layer):
            return {"Size": self._driver.apply_diff(layer, parent, stream)}

    def _visible(self, text: str) -> LayerId | None:
        layer = layer_id(text)
        record = self._store.load(layer)
        if record is None or record.deleted or owner_of(record) not in _VISIBLE:
            return None
        return layer

    def _must_exist(self, text: str) -> LayerId:
        layer = self._visible(text)
        if layer is None:
            raise LayerNotFound(text)
        return layer

    def _pair(self, request: LayerRequest) -> tuple[LayerId, str]:
        layer = self._must_exist(request.id)
        return layer, self._must_exist(request.parent) if request.parent else ""
