"""The port's operations as the engine process answers them: one table, checked arguments."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import AF_UNIX, SO_ACCEPTCONN, SOL_SOCKET
from socket import socket as Socket  # noqa: N812 - a class; `socket` is an argument here
from typing import Any, Final, get_type_hints

from devmapper.engine.embedded import protocol
from devmapper.engine.embedded.exports import Exports
from devmapper.engine.embedded.pool import EmbeddedPool
from devmapper.engine.embedded.records import ExportedDevice
from devmapper.engine.embedded.runtime import Paths, check_name
from devmapper.engine.port import (
    ChangedRange,
    NbdExport,
    Outcome,
    PoolStatus,
    PoolTable,
    ThinStatus,
)
from devmapper.errors import EngineError
from devmapper.units import Bytes, ThinId, TransactionId, thin_id


class Operations:
    """What a client can ask of the pool and its exports.

    The annotations of the methods are the schema of the requests.
    """

    def __init__(self, pool: EmbeddedPool, exports: Exports, paths: Paths) -> None:
        self._pool = pool
        self._exports = exports
        self._paths = paths

    def call(self, op: str, args: Mapping[str, Any], descriptor: int | None = None) -> object:
        """Answer *op*; `EngineError` if there is none such or the arguments are not its own.

        *descriptor* came with the request; it is the caller's.
        """
        if (descriptor is not None) != (op == "serve_nbd") or "listener" in args:
            raise EngineError(f"operation {op!r} came with a descriptor, or without one")
        if descriptor is not None:
            args = {**args, "listener": descriptor}
        method: Callable[..., object] | None = getattr(self, op, None) if op in OPS else None
        if method is None:
            raise EngineError(f"engine process knows no operation {op!r}")
        types = get_type_hints(method)
        types.pop("return", None)
        if set(types) != set(args):
            raise EngineError(
                f"operation {op!r} takes {', '.join(types) or 'no arguments'},"
                f" but was given {', '.join(args) or 'none'}"
            )
        return method(**{key: protocol.unpack(types[key], value) for key, value in args.items()})

    def table(self) -> PoolTable:
        return self._pool.table()

    def status(self) -> PoolStatus:
        return self._pool.status()

    def thin_ids(self) -> list[ThinId]:
        return self._pool.thin_ids()

    def thin_status(self, thin_id: ThinId) -> ThinStatus:
        return self._pool.thin_status(thin_id)

    def changed_ranges(self, thin_a: ThinId, thin_b: ThinId) -> list[ChangedRange]:
        return self._pool.changed_ranges(thin_a, thin_b)

    def own_blocks(self, thin_id: ThinId, origin: ThinId) -> int:
        return self._pool.own_blocks(thin_id, origin)

    def create_thin(self, thin_id: ThinId) -> None:
        self._pool.create_thin(_id(thin_id))

    def create_snap(self, thin_id: ThinId, origin: ThinId) -> None:
        self._pool.create_snap(_id(thin_id), origin)

    def delete(self, thin_id: ThinId) -> None:
        self._pool.delete(thin_id)

    def set_transaction_id(self, expected: TransactionId, new: TransactionId) -> None:
        self._pool.set_transaction_id(expected, new)

    def commit(self) -> None:
        self._pool.commit()

    def resize(self, table: PoolTable) -> None:
        self._pool.resize(table)

    def export_metadata(self) -> Path:
        """Write the copy into the runtime directory; the client moves it to where it is wanted.

        Its own target may stand on a device of ours, where this process must not write.
        """
        directory = Path(tempfile.mkdtemp(prefix="metadata-", dir=self._paths.directory))
        target = directory / "metadata"
        self._pool.export_metadata(target)
        return target

    def activate(self, name: str, thin_id: ThinId, size: Bytes) -> Outcome:
        return self._exports.activate(check_name(name, "device"), _id(thin_id), size)

    def deactivate(self, name: str) -> Outcome:
        return self._exports.deactivate(name)

    def defer(self, name: str) -> Outcome:
        return self._exports.defer(name)

    def serve_nbd(
        self,
        name: str,
        thin_id: ThinId,
        size: Bytes,
        socket: Path,
        read_only: bool,  # noqa: FBT001 - by name, as all of them
        listener: int,
    ) -> NbdExport:
        """Serve on *listener*, a unix socket that listens under the name *socket*."""
        return self._exports.serve_nbd(
            check_name(name, "device"),
            _id(thin_id),
            size,
            _listening(listener),
            socket,
            read_only=read_only,
        )

    def cancel_deferred(self, name: str) -> Outcome:
        return self._exports.cancel_deferred(name)

    def devices(self) -> list[ExportedDevice]:
        return self._exports.devices()


OPS: Final = frozenset(name for name in vars(Operations) if name[0] != "_") - {"call"}


def _listening(descriptor: int) -> Socket:
    """A socket of our own out of the descriptor that came with a request."""
    listener = Socket(fileno=os.dup(descriptor))
    if listener.family != AF_UNIX or not listener.getsockopt(SOL_SOCKET, SO_ACCEPTCONN):
        listener.close()
        raise EngineError("the descriptor that came along is no listening unix socket")
    listener.settimeout(None)
    return listener


def _id(value: ThinId) -> ThinId:
    return thin_id(value)
