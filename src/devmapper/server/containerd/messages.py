"""Our words for snapshots as containerd's messages, and containerd's bytes as messages."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from devmapper.errors import UsageError
from devmapper.server.containerd.api import mount_pb2, snapshots_pb2
from devmapper.snapshots.model import Info, Kind, Mount

M = TypeVar("M", bound=Message)

CHUNK: Final = 100  # snapshots in one message of a List: containerd services/snapshots/service.go
_NANOSECONDS: Final = 1_000_000_000
_KINDS: Final = {
    Kind.VIEW: snapshots_pb2.VIEW,
    Kind.ACTIVE: snapshots_pb2.ACTIVE,
    Kind.COMMITTED: snapshots_pb2.COMMITTED,
}


def parsed(kind: type[M], raw: bytes) -> M:
    """The message of that *kind* in *raw*; `UsageError` for bytes that are none."""
    try:
        return kind.FromString(raw)
    except DecodeError as err:
        raise UsageError(f"the request is no {kind.__name__}: its bytes cannot be decoded") from err


def info_message(info: Info) -> snapshots_pb2.Info:
    return snapshots_pb2.Info(
        name=info.name,
        parent=info.parent,
        kind=_KINDS[info.kind],
        created_at=_timestamp(info.created),
        updated_at=_timestamp(info.updated),
        labels=info.labels,
    )


def mount_messages(mounts: Sequence[Mount]) -> list[mount_pb2.Mount]:
    return [
        mount_pb2.Mount(
            type=mount.type, source=mount.source, target=mount.target, options=mount.options
        )
        for mount in mounts
    ]


def list_messages(infos: Iterable[Info]) -> Iterator[snapshots_pb2.ListSnapshotsResponse]:
    """As many messages as it takes: none for no snapshots."""
    left = iter(infos)
    while chunk := list(islice(left, CHUNK)):
        yield snapshots_pb2.ListSnapshotsResponse(info=map(info_message, chunk))


def _timestamp(nanoseconds: int) -> Timestamp:
    seconds, nanos = divmod(nanoseconds, _NANOSECONDS)
    return Timestamp(seconds=seconds, nanos=nanos)
