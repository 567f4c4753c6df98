"""Trying the snapshotter as containerd uses it: ask, prepare, mount, write, remove."""

import os
import secrets
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, TypeVar

from devmapper.linux import detached
from devmapper.server.config import Config
from devmapper.server.snippets import containerd
from devmapper.server.snippets.trial import (
    Step,
    TrialFailed,
    daemon_runs,
    socket_is_there,
    tried,
    until_one_fails,
)

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

_SECONDS: Final = 30.0
_CONTENT: Final = b"written by devmapper config containerd --check\n"
_REPAIR: Final = "the daemon's log says more: journalctl -u devmapper"

M = TypeVar("M", bound="Message")


def steps(config: Config, file: Path, *, cri: bool = False) -> Iterator[Step]:
    """The daemon's side until something fails, and containerd's own file in any case."""
    socket = config.containerd_socket
    yield from until_one_fails(
        lambda: daemon_runs(config.root),
        lambda: socket_is_there(socket, "--containerd"),
        lambda: tried("answer", lambda: _answers(socket), _REPAIR),
        lambda: tried("scratch snapshot", lambda: _scratch(socket), _REPAIR),
    )
    hint = "devmapper config containerd prints what belongs there"
    yield tried("containerd's file", lambda: _is_told(file, socket), hint)
    if cri:
        yield tried("CRI", lambda: _pods_use_it(file, socket), hint)


def _answers(socket: Path) -> str:
    import grpc

    with _client(socket) as call:
        try:
            call("Stat", _api().StatSnapshotRequest(key=_key()), _api().StatSnapshotResponse)
        except grpc.RpcError as err:
            if err.code() is not grpc.StatusCode.NOT_FOUND:
                raise TrialFailed(f"it answers with {_words(err)}") from err
            return "it answers, and does not know what does not exist"
    raise TrialFailed("it knows a snapshot that was never made")


def _scratch(socket: Path) -> str:
    """Make one, write a file to it by way of its block device, read it back, and remove it."""
    import grpc
    from google.protobuf.empty_pb2 import Empty

    api, key = _api(), _key()
    with _client(socket) as call:
        try:
            reply = call(
                "Prepare", api.PrepareSnapshotRequest(key=key), api.PrepareSnapshotResponse
            )
            try:
                (mount,) = reply.mounts
                flags = [option for option in mount.options if "=" not in option]
                with detached.mounted_detached(Path(mount.source), mount.type, flags=flags) as root:
                    _write_and_read(root)
            finally:
                call("Remove", api.RemoveSnapshotRequest(key=key), Empty)
        except grpc.RpcError as err:
            raise TrialFailed(f"it answers with {_words(err)}") from err
    return f"made, mounted ({mount.type} on {mount.source}), written and removed"


def _write_and_read(root: int) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open("scratch", flags, 0o600, dir_fd=root)
    try:
        os.write(fd, _CONTENT)
        os.fsync(fd)
        if os.pread(fd, len(_CONTENT), 0) != _CONTENT:
            raise TrialFailed("what was written reads differently")
    finally:
        os.close(fd)


def _is_told(file: Path, socket: Path) -> str:
    names = containerd.proxies_at(file, socket)
    if not names:
        raise TrialFailed(f"{str(file)!r} has no proxy plugin of type snapshot at {str(socket)!r}")
    return f"{str(file)!r} has it as snapshotter {names[-1]!r}"


def _pods_use_it(file: Path, socket: Path) -> str:
    chosen = containerd.cri_snapshotter(file)
    if chosen not in containerd.proxies_at(file, socket):
        raise TrialFailed(f"{str(file)!r} lets pods run on snapshotter {chosen or 'overlayfs'!r}")
    return f"pods run on snapshotter {chosen!r}"


def _api() -> ModuleType:
    from devmapper.server.containerd.api import snapshots_pb2

    return snapshots_pb2


@contextmanager
def _client(socket: Path) -> "Iterator[Callable[[str, Message, type[M]], M]]":
    """A function that calls the service: method, request, kind of the reply."""
    import grpc

    from devmapper.server.containerd.service import SERVICE

    # A proxy that is meant for the network has no business here
    options = (("grpc.enable_http_proxy", 0),)
    address = f"unix:{urllib.parse.quote(os.fsencode(socket))}"
    with grpc.insecure_channel(address, options=options) as channel:

        def call(method: str, request: "Message", kind: type[M]) -> M:
            invoke: Callable[..., M] = channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=kind.FromString,
            )
            return invoke(request, timeout=_SECONDS)

        yield call


def _words(error: "grpc.RpcError") -> str:
    return f"{error.code().name}: {error.details()}"


def _key() -> str:
    return f"devmapper-check/{secrets.token_hex(8)}"
