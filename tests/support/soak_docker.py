"""A client of the soak that works as dockerd does: layers are directories, and travel as tars."""

import hashlib
import http.client
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import pytest

from tests.support.layers_client import PluginClient, PluginError
from tests.support.soak import (
    SHARED,
    Client,
    Files,
    Lost,
    Refused,
    Rig,
    check_files,
    sync_directory,
    write_files,
)

T = TypeVar("T")

_LIVE: Final = 10
_SIZE: Final = "96M"
_MODIFIED, _ADDED, _DELETED = 0, 1, 2


@dataclass
class Layer:
    parent: str
    files: Files = field(default_factory=dict)  # all that it shows
    before: Files = field(default_factory=dict)  # what its parent showed
    uses: int = 0
    unsure: bool = False  # a Get or Put was under way at a kill: it may have been counted
    root: Path | None = None


class DockerClient(Client):
    def __init__(self, rig: Rig, name: str, seed: int) -> None:
        super().__init__(rig, name, seed)
        self.layers: dict[str, Layer] = {}
        self._client = PluginClient(rig.daemon.docker)

    def reconnect(self) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def step(self) -> None:
        if len(self.layers) >= _LIVE:
            self.remove_some()
            return
        chosen: Callable[[], None] = self.random.choice(
            (
                *(self.grow,) * 4,
                *(self.unpack,) * 2,
                *(self.diff,) * 2,
                self.changes,
                *(self.look,) * 2,
                *(self.hold,) * 2,
                *(self.let_go,) * 2,
                *(self.remove_some,) * 2,
                self.ask_about,
                self.refused,
            )
        )
        chosen()

    def grow(self) -> None:
        """A layer is made and its files are changed."""
        parent = self.random.choice(["", SHARED, *self.layers])
        layer = self.create(parent, _SIZE if not parent and self.random.random() < 0.15 else "")
        one = self.layers[layer]
        root = self.get(layer)
        check_files(root, one.files, layer)
        new = self.new_files()
        if one.files and self.random.random() < 0.5:
            new[self.random.choice(sorted(one.files))] = self.random.randbytes(333)
        write_files(root, new)
        one.files.update(new)
        if len(one.before) > 1 and self.random.random() < 0.5:
            doomed = self.random.choice(sorted(one.before))
            (root / doomed).unlink()
            sync_directory((root / doomed).parent)
            del one.files[doomed]
        self.put(layer)
        if self.random.random() < 0.1:
            self.remove(layer)

    def unpack(self) -> None:
        """A layer comes as a tar.  One that was broken off is removed and made again."""
        parent = self.random.choice(["", SHARED, *self.layers])
        layer = self.create(parent)
        one, new = self.layers[layer], self.new_files()
        tar = make_tar(new)

        def again() -> None:
            self._raw(lambda: self._client.remove(layer))
            self._raw(lambda: self._client.create(layer, parent))

        size = self.ask(
            f"ApplyDiff {layer}",
            lambda: self._raw(lambda: self._client.apply_diff(layer, parent, tar)),
            again=again,
        )
        assert size == sum(map(len, new.values()))
        one.files.update(new)

    def diff(self) -> None:
        """The tar has what the layer has changed."""
        layer = self.pick()
        if layer is None:
            return
        one = self.layers[layer]
        found = self.ask(f"Diff {layer}", lambda: self._raw(lambda: self._tar(layer, one.parent)))
        deleted = {whiteout(name): b"" for name in one.before.keys() - one.files.keys()}
        assert found == {**self.changed(one), **deleted}, f"{layer}: {sorted(found or ())}"

    def changes(self) -> None:
        layer = self.pick()
        if layer is None:
            return
        one = self.layers[layer]
        found = self.ask(
            f"Changes {layer}",
            lambda: self._raw(lambda: self._client.changes(layer, one.parent)),
        )
        wanted = {
            f"/{name}": _MODIFIED if name in one.before else _ADDED for name in self.changed(one)
        }
        wanted |= {f"/{name}": _DELETED for name in one.before.keys() - one.files.keys()}
        assert found is not None
        assert {path: kind for path, kind in found.items() if path != "/d"} == wanted, layer

    def look(self) -> None:
        if layer := self.pick():
            self.check(layer)

    def check(self, layer: str) -> None:
        check_files(self.get(layer), self.layers[layer].files, layer)
        self.put(layer)

    def hold(self) -> None:
        """A container runs: its layer is used over steps and kills, by more than one."""
        if layer := self.pick():
            check_files(self.get(layer), self.layers[layer].files, layer)

    def let_go(self) -> None:
        if held := [layer for layer, one in self.layers.items() if one.uses]:
            self.put(self.random.choice(held))

    def ask_about(self) -> None:
        layer = self.pick()
        if layer is None:
            return
        found = self.ask(
            f"GetMetadata {layer}",
            lambda: self._raw(lambda: self._client.call("GraphDriver.GetMetadata", ID=layer)),
        )
        assert found is not None
        assert int(found["Metadata"]["DeviceId"]) > 0
        assert self.exists(layer)
        assert not self.exists(layer_id(self.name, "none"))
        self.ask("Status", lambda: self._raw(lambda: self._client.call("GraphDriver.Status")))

    def refused(self) -> None:
        layer, none = layer_id(self.name, "refused"), layer_id(self.name, "none")
        with pytest.raises(Refused) as caught:
            self.ask(f"Create {layer}", lambda: self._raw(lambda: self._client.create(layer, none)))
        assert caught.value.code == http.client.OK

    def remove_some(self) -> None:
        parents = {one.parent for one in self.layers.values()}
        if leaves := sorted(self.layers.keys() - parents):
            self.remove(self.random.choice(leaves))

    def pick(self) -> str | None:
        return self.random.choice(sorted(self.layers)) if self.layers else None

    def create(self, parent: str, size: str = "") -> str:
        layer = layer_id(self.name, self.new_name())
        self.ask(
            f"Create {layer} of {parent!r} {size}",
            lambda: self._raw(lambda: self._client.create(layer, parent, size)),
            done=lambda _: self.exists(layer),
        )
        found = self.rig.shared.get(parent, {})
        files = dict(self.layers[parent].files if parent in self.layers else found)
        self.layers[layer] = Layer(parent, files, dict(files))
        return layer

    def get(self, layer: str) -> Path:
        one = self.layers[layer]
        life = self.rig.life()
        root = self.ask(f"Get {layer}", lambda: self._raw(lambda: self._client.get(layer)))
        assert root is not None
        assert one.root in (None, root)
        one.unsure |= life != self.rig.kills
        one.uses += 1
        one.root = root
        return root

    def put(self, layer: str) -> None:
        """One use less; the last one unmounts, and only that."""
        one = self.layers[layer]
        life = self.rig.life()
        self.ask(f"Put {layer}", lambda: self._raw(lambda: self._client.put(layer)))
        one.uses -= 1
        assert one.root is not None
        one.unsure |= life != self.rig.kills
        if one.unsure:  # how many are left cannot be known: none, then
            while one.root.exists():
                self.ask(f"Put {layer}", lambda: self._raw(lambda: self._client.put(layer)))
            one.uses, one.unsure = 0, False
        if one.uses == 0:
            assert not one.root.exists(), f"{layer} is mounted after its last Put"
            one.root = None
        else:
            check_files(one.root, one.files, layer)

    def remove(self, layer: str) -> None:
        """As dockerd does: also what it thinks is mounted, if it has forgotten by whom."""
        one = self.layers[layer]
        while one.uses and self.random.random() < 0.7:
            self.put(layer)
        self.ask(f"Remove {layer}", lambda: self._raw(lambda: self._client.remove(layer)))
        assert one.root is None or not one.root.exists()
        del self.layers[layer]

    def exists(self, layer: str) -> bool:
        found = self.ask(f"Exists {layer}", lambda: self._raw(lambda: self._client.exists(layer)))
        return found is True

    def settle(self) -> None:
        for layer, one in self.layers.items():
            assert self.exists(layer), f"{layer} is lost"
            if one.uses:
                assert one.root is not None
                check_files(one.root, one.files, layer)
            self.check(layer)

    def remove_all(self) -> None:
        for layer, one in self.layers.items():
            while one.uses:
                self.put(layer)
        while self.layers:
            self.remove_some()

    @staticmethod
    def changed(one: Layer) -> Files:
        return {name: data for name, data in one.files.items() if one.before.get(name) != data}

    def _tar(self, layer: str, parent: str) -> Files:
        """What the tar's files hold; a whiteout holds nothing."""
        with (
            self._client.diff(layer, parent) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            found = {}
            for member in tar:
                if member.isreg():
                    content = tar.extractfile(member)
                    assert content is not None
                    found[member.name] = content.read()
            while stream.read(65536):
                pass
        return found

    def _raw(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except PluginError as err:
            raise Refused(err.status, str(err)) from err
        except (OSError, http.client.HTTPException, tarfile.TarError) as err:
            self._client.close()
            raise Lost(repr(err)) from err


def layer_id(client: str, name: str) -> str:
    """As Docker's: 64 hexadecimal digits."""
    return hashlib.sha256(f"{client} {name}".encode()).hexdigest()


def whiteout(name: str) -> str:
    path = Path(name)
    return str(path.with_name(f".wh.{path.name}"))


def make_tar(files: Files) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        if any("/" in name for name in files):
            directory = tarfile.TarInfo("d")
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(directory)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()
