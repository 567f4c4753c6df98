"""A client of containerd's Snapshots service: what a proxy plugin of containerd sends."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from devmapper.server.containerd.api import mount_pb2
from devmapper.server.containerd.api import snapshots_pb2 as api

SERVICE = "containerd.services.snapshots.v1.Snapshots"
NAME = "devmapper"
SECONDS = 60.0

M = TypeVar("M", bound=Message)


class SnapshotsClient:
    """Every method raises `grpc.RpcError`."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> list[mount_pb2.Mount]:
        request = api.PrepareSnapshotRequest(
            snapshotter=NAME, key=key, parent=parent, labels=labels or {}
        )
        return list(self.call("Prepare", request, api.PrepareSnapshotResponse).mounts)

    def view(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> list[mount_pb2.Mount]:
        request = api.ViewSnapshotRequest(
            snapshotter=NAME, key=key, parent=parent, labels=labels or {}
        )
        return list(self.call("View", request, api.ViewSnapshotResponse).mounts)

    def mounts(self, key: str) -> list[mount_pb2.Mount]:
        request = api.MountsRequest(snapshotter=NAME, key=key)
        return list(self.call("Mounts", request, api.MountsResponse).mounts)

    def commit(
        self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = ""
    ) -> None:
        request = api.CommitSnapshotRequest(
            snapshotter=NAME, name=name, key=key, labels=labels or {}, parent=parent
        )
        self.call("Commit", request, Empty)

    def remove(self, key: str) -> None:
        self.call("Remove", api.RemoveSnapshotRequest(snapshotter=NAME, key=key), Empty)

    def stat(self, key: str) -> api.Info:
        request = api.StatSnapshotRequest(snapshotter=NAME, key=key)
        return self.call("Stat", request, api.StatSnapshotResponse).info

    def update(self, name: str, labels: Mapping[str, str], *paths: str) -> api.Info:
        request = api.UpdateSnapshotRequest(
            snapshotter=NAME,
            info=api.Info(name=name, labels=labels),
            update_mask=FieldMask(paths=paths),
        )
        return self.call("Update", request, api.UpdateSnapshotResponse).info

    def usage(self, key: str) -> tuple[int, int]:
        request = api.UsageRequest(snapshotter=NAME, key=key)
        found = self.call("Usage", request, api.UsageResponse)
        return found.size, found.inodes

    def cleanup(self) -> None:
        self.call("Cleanup", api.CleanupRequest(snapshotter=NAME), Empty)

    def chunks(self, *filters: str) -> Iterator[Sequence[api.Info]]:
        """What each message of a List holds."""
        ask = self.channel.unary_stream(
            f"/{SERVICE}/List",
            request_serializer=api.ListSnapshotsRequest.SerializeToString,
            response_deserializer=api.ListSnapshotsResponse.FromString,
        )
        request = api.ListSnapshotsRequest(snapshotter=NAME, filters=filters)
        for message in ask(request, timeout=SECONDS):
            yield message.info

    def infos(self, *filters: str) -> list[api.Info]:
        return [info for chunk in self.chunks(*filters) for info in chunk]

    def names(self, *filters: str) -> list[str]:
        return [info.name for info in self.infos(*filters)]

    def call(self, method: str, request: Message, reply: type[M]) -> M:
        return reply.FromString(self.raw(method, request.SerializeToString()))

    def raw(self, method: str, request: bytes, *, timeout: float = SECONDS) -> bytes:
        """Bytes as they are, whether they are a message or not."""
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(
            f"/{SERVICE}/{method}"
        )
        return ask(request, timeout=timeout)


@contextmanager
def connected(socket: Path) -> Iterator[SnapshotsClient]:
    """A client of the service at *socket*; it is waited for."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        grpc.channel_ready_future(channel).result(timeout=SECONDS)
        yield SnapshotsClient(channel)
