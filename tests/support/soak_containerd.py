"""A client of the soak that works as containerd does: it mounts the block devices itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import grpc
import pytest

from devmapper.linux import mount as mounts
from devmapper.linux.mount import MountFlag
from devmapper.server.containerd.api import mount_pb2
from devmapper.server.containerd.api import snapshots_pb2 as api
from tests.support.snapshots_client import SnapshotsClient
from tests.support.soak import SHARED, Client, Files, Lost, Refused, Rig, check_files, write_files

T = TypeVar("T")

MAX_SIZE: Final = {"containerd.io/snapshot/max-size": "96MiB"}
_LIVE: Final = 10  # snapshots of one client at most
_GONE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)
_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1),)
_EXISTS: Final = grpc.StatusCode.ALREADY_EXISTS
_NOT_FOUND: Final = grpc.StatusCode.NOT_FOUND
_KINDS: Final = {api.ACTIVE: "active", api.VIEW: "view", api.COMMITTED: "committed"}


@dataclass
class Snapshot:
    kind: str
    parent: str
    labels: dict[str, str]
    files: Files = field(default_factory=dict)  # all that it shows
    place: Path | None = None  # where it is mounted now


class ContainerdClient(Client):
    def __init__(self, rig: Rig, name: str, seed: int) -> None:
        super().__init__(rig, name, seed)
        self.snapshots: dict[str, Snapshot] = {}
        self._channel: grpc.Channel | None = None
        self.reconnect()

    def reconnect(self) -> None:
        self.close()
        self._channel = grpc.insecure_channel(f"unix:{self.rig.daemon.containerd}", _OPTIONS)
        self._client = SnapshotsClient(self._channel)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def step(self) -> None:
        if len(self.snapshots) >= _LIVE:
            self.remove_some()
            return
        chosen: Callable[[], None] = self.random.choice(
            (
                *(self.grow,) * 5,
                *(self.look,) * 3,
                *(self.remove_some,) * 2,
                *(self.go_on,) * 2,
                self.update,
                self.usage,
                self.compare_list,
                self.cleanup,
                self.refused,
            )
        )
        chosen()

    def grow(self) -> None:
        """A snapshot is made and written to; it is committed, thrown away, or stays mounted."""
        key, parent = self.new_name(), self.random.choice(["", SHARED, *self.committed()])
        labels = {"containerd.io/gc.ref": key} if self.random.random() < 0.5 else {}
        # What descends from a larger one cannot be smaller
        if parent == "" and self.random.random() < 0.15:
            labels |= MAX_SIZE
        files = dict(self.shown_by(parent))
        found = self.make("Prepare", key, parent, labels)
        made = self.snapshots[key] = Snapshot("active", parent, labels, files)
        new = self.new_files()
        if self.random.random() < 0.2:
            self.keep_mounted(key, found)
            assert made.place is not None
            write_files(made.place, new)
            made.files.update(new)
            return
        with self.mounted(found) as top:
            check_files(top, made.files, key)
            write_files(top, new)
        made.files.update(new)
        if self.random.random() < 0.2:
            self.remove(key)
        elif self.random.random() < 0.9:
            self.commit(key)

    def look(self) -> None:
        """What is committed has its files, and cannot be written to."""
        if names := self.committed():
            self.check(self.random.choice(names))

    def check(self, name: str) -> None:
        key = self.new_name()
        found = self.make("View", key, name, {})
        self.snapshots[key] = Snapshot("view", name, {}, self.snapshots[name].files)
        with self.mounted(found) as top:
            check_files(top, self.snapshots[name].files, name)
        self.remove(key)

    def go_on(self) -> None:
        """An active snapshot goes on: what was mounted over a kill is as it was."""
        active = [key for key, one in self.snapshots.items() if one.kind == "active"]
        if not active:
            return
        key = self.random.choice(active)
        one = self.snapshots[key]
        if one.place is None:
            found = self.ask(f"Mounts {key}", lambda: self._raw(lambda: self._client.mounts(key)))
            assert found is not None
            self.keep_mounted(key, found)
        assert one.place is not None
        check_files(one.place, one.files, key)
        new = self.new_files()
        write_files(one.place, new)
        one.files.update(new)
        if self.random.random() < 0.6:
            self.unmount(key)
            if self.random.random() < 0.7:
                self.commit(key)

    def update(self) -> None:
        if not self.snapshots:
            return
        name = self.random.choice(sorted(self.snapshots))
        one = self.snapshots[name]
        value = str(self.random.random())
        self.ask(
            f"Update {name}",
            lambda: self._raw(lambda: self._client.update(name, {"x": value}, "labels.x")),
        )
        one.labels["x"] = value
        info = self.ask(f"Stat {name}", lambda: self._raw(lambda: self._client.stat(name)))
        assert info is not None
        self.check_info(info)

    def usage(self) -> None:
        if not self.snapshots:
            return
        name = self.random.choice(sorted(self.snapshots))
        found = self.ask(f"Usage {name}", lambda: self._raw(lambda: self._client.usage(name)))
        assert found is not None
        one = self.snapshots[name]
        below = self.shown_by(one.parent)
        if one.kind == "committed":
            assert found[1] >= len(one.files) - len(below), (name, found)

    def compare_list(self) -> None:
        found = self.ask(
            "List", lambda: self._raw(lambda: self._client.infos(f"name~=^{self.name}-"))
        )
        assert found is not None
        assert {info.name for info in found} == self.snapshots.keys()
        for info in found:
            self.check_info(info)

    def cleanup(self) -> None:
        self.ask("Cleanup", lambda: self._raw(self._client.cleanup))

    def refused(self) -> None:
        """What cannot be is refused, in this protocol's own way."""
        key = self.new_name()
        self.must_be_refused(
            f"Prepare {key}", lambda: self._client.prepare(key, "none"), _NOT_FOUND
        )
        parents = [one.parent for one in self.snapshots.values() if one.parent]
        if parents:
            name = self.random.choice(parents)
            code = grpc.StatusCode.FAILED_PRECONDITION
            self.must_be_refused(f"Remove {name}", lambda: self._client.remove(name), code)

    def must_be_refused(self, what: str, call: Callable[[], object], code: grpc.StatusCode) -> None:
        with pytest.raises(Refused) as caught:
            self.ask(what, lambda: self._raw(call))
        assert caught.value.code is code

    def remove_some(self) -> None:
        parents = {one.parent for one in self.snapshots.values()}
        leaves = sorted(self.snapshots.keys() - parents)
        if leaves:
            self.remove(self.random.choice(leaves))

    def shown_by(self, parent: str) -> Files:
        found = self.snapshots.get(parent)
        return self.rig.shared.get(parent, {}) if found is None else found.files

    def committed(self) -> list[str]:
        return [name for name, one in self.snapshots.items() if one.kind == "committed"]

    def make(
        self, how: str, key: str, parent: str, labels: dict[str, str]
    ) -> list[mount_pb2.Mount]:
        call = self._client_call(how)
        found = self.ask(
            f"{how} {key} of {parent!r} {labels}",
            lambda: self._raw(lambda: call()(key, parent, labels)),
            done=lambda err: err.code is _EXISTS,
        )
        if found is None:
            found = self.ask(f"Mounts {key}", lambda: self._raw(lambda: self._client.mounts(key)))
        assert found is not None
        return found

    def _client_call(self, how: str) -> Callable[[], Callable[..., list[mount_pb2.Mount]]]:
        return lambda: self._client.prepare if how == "Prepare" else self._client.view

    def commit(self, key: str) -> None:
        one = self.snapshots[key]
        name = self.new_name()
        labels = {"committed": key}
        self.ask(
            f"Commit {key} as {name}",
            lambda: self._raw(lambda: self._client.commit(name, key, labels)),
            done=lambda err: err.code in (_EXISTS, _NOT_FOUND),
        )
        del self.snapshots[key]
        self.snapshots[name] = Snapshot("committed", one.parent, labels, one.files)

    def remove(self, key: str) -> None:
        self.unmount(key)
        self.ask(
            f"Remove {key}",
            lambda: self._raw(lambda: self._client.remove(key)),
            done=lambda err: err.code is _NOT_FOUND,
        )
        del self.snapshots[key]

    def check_info(self, info: api.Info) -> None:
        one = self.snapshots[info.name]
        assert _KINDS[info.kind] == one.kind, info
        assert info.parent == one.parent, info
        assert dict(info.labels) == one.labels, info

    def settle(self) -> None:
        for key, one in self.snapshots.items():
            if one.place is not None:
                check_files(one.place, one.files, key)
        self.compare_list()
        for name in self.committed():
            self.check(name)
        self.compare_list()

    def remove_all(self) -> None:
        while self.snapshots:
            self.remove_some()

    def keep_mounted(self, key: str, found: list[mount_pb2.Mount]) -> None:
        place = self.rig.folder / key
        place.mkdir()
        mount(found, place)
        self.snapshots[key].place = place

    def unmount(self, key: str) -> None:
        one = self.snapshots[key]
        if one.place is not None:
            mounts.unmount(one.place)
            one.place.rmdir()
            one.place = None

    @contextmanager
    def mounted(self, found: list[mount_pb2.Mount]) -> Iterator[Path]:
        place = self.rig.folder / self.new_name()
        place.mkdir()
        mount(found, place)
        try:
            yield place
        finally:
            mounts.unmount(place)
            place.rmdir()

    def _raw(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as err:
            code, text = err.code(), err.details()
            if code in _GONE:
                raise Lost(f"{code}: {text}") from err
            raise Refused(code, text or "") from err
        except ValueError as err:  # the channel
            raise Lost(str(err)) from err


def mount(found: list[mount_pb2.Mount], place: Path) -> None:
    """What containerd does with the answer."""
    (only,) = found
    flags = MountFlag.RDONLY if "ro" in only.options else MountFlag(0)
    data = ",".join(option for option in only.options if option not in ("ro", "rw"))
    mounts.mount(Path(only.source), place, only.type, flags=flags, data=data)
