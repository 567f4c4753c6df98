"""SIGKILL at every step of what changes snapshots, on a real engine; a function of a factory."""

from collections.abc import Callable
from pathlib import Path

from devmapper.deviceset.deviceset import DeviceSet
from devmapper.deviceset.steps import Step
from devmapper.errors import SnapshotNotFound
from devmapper.snapshots import Kind, Snapshots
from tests.conformance.kill_suite import KillBase, Killing, Noting, run_killed
from tests.support.graphs import check_consistent

MAX_SIZE = {"containerd.io/snapshot/max-size": "40MiB"}

Operation = Callable[[Snapshots], object]


def remove_all(snapshots: Snapshots) -> None:
    """Leaf first, as containerd's garbage collector does it."""
    while left := list(snapshots.walk()):
        parents = {info.parent for info in left}
        for info in left:
            if info.name not in parents:
                snapshots.remove(info.name)


def is_there(snapshots: Snapshots, key: str) -> bool:
    try:
        snapshots.stat(key)
    except SnapshotNotFound:
        return False
    return True


class SnapshotKillSuite(KillBase):
    """What changes snapshots."""

    def kill_at_each(
        self,
        home: Path,
        before: Operation,
        operation: Operation,
        after: Callable[[Step, Snapshots], None],
    ) -> list[Step]:
        noting = Noting()
        with self.open(home, checkpoint=noting) as devices:
            snapshots = Snapshots(devices)
            before(snapshots)
            noting.seen.clear()
            operation(snapshots)
            steps = list(noting.seen)
            remove_all(snapshots)
            self.look(home, devices)
        for step in steps:

            def work(step: Step = step) -> None:
                killing = Killing(step, armed=False)
                snapshots = Snapshots(self.open(home, checkpoint=killing))
                before(snapshots)
                killing.armed = True
                operation(snapshots)

            run_killed(work)
            with self.open(home) as devices:
                snapshots = Snapshots(devices)
                self.look(home, devices)
                after(step, snapshots)
                remove_all(snapshots)
                self.look(home, devices)
        return steps

    def look(self, home: Path, devices: DeviceSet) -> None:
        """Graph and pool agree; only what has mounts is active."""
        check_consistent(home, devices)
        snapshots = Snapshots(devices)
        used = [info for info in snapshots.walk() if info.kind is not Kind.COMMITTED]
        assert len(devices.pool.devices()) <= len(used)
        records = devices.parts.graph.store.load_all()
        assert [layer for layer, record in records.items() if record.deleted] == []

    def test_the_first_prepare(self, home: Path) -> None:
        """The root is made on the way; each kill begins with a graph that has none."""
        noting = Noting()
        with self.open(home, checkpoint=noting) as devices:
            noting.seen.clear()
            Snapshots(devices).prepare("k")
        assert {Step.LAYER_GROWN, Step.LAYER_COMPLETED} <= set(noting.seen)
        for step in noting.seen:
            with self.open(home) as devices:
                remove_all(Snapshots(devices))
                devices.delete_device("snapshot-root")

            def work(step: Step = step) -> None:
                killing = Killing(step, armed=False)
                snapshots = Snapshots(self.open(home, checkpoint=killing))
                killing.armed = True
                snapshots.prepare("k")

            run_killed(work)
            with self.open(home) as devices:
                snapshots = Snapshots(devices)
                self.look(home, devices)
                assert not is_there(snapshots, "k")
                snapshots.prepare("k")
                snapshots.commit("a", "k")
                self.look(home, devices)

    def test_prepare(self, home: Path) -> None:
        def after(step: Step, snapshots: Snapshots) -> None:
            assert is_there(snapshots, "k") is (step is Step.COMMITTED)
            if is_there(snapshots, "k"):
                assert snapshots.mounts("k")
                assert snapshots.stat("k").labels == {"x": "y"}

        steps = self.kill_at_each(
            home, with_base, lambda snapshots: snapshots.prepare("k", "base", {"x": "y"}), after
        )
        assert Step.THIN_CREATED in steps

    def test_prepare_with_a_size(self, home: Path) -> None:
        def after(step: Step, snapshots: Snapshots) -> None:
            assert is_there(snapshots, "k") is (step is Step.LAYER_COMPLETED)

        steps = self.kill_at_each(
            home, with_base, lambda snapshots: snapshots.prepare("k", "base", MAX_SIZE), after
        )
        assert Step.LAYER_GROWN in steps

    def test_commit(self, home: Path) -> None:
        def before(snapshots: Snapshots) -> None:
            with_base(snapshots)
            snapshots.prepare("k", "base")

        def after(step: Step, snapshots: Snapshots) -> None:
            assert is_there(snapshots, "a")
            assert not is_there(snapshots, "k")

        steps = self.kill_at_each(home, before, lambda snapshots: snapshots.commit("a", "k"), after)
        assert steps == [Step.RECORD_REWRITTEN]

    def test_update(self, home: Path) -> None:
        def after(step: Step, snapshots: Snapshots) -> None:
            assert snapshots.stat("base").labels == {"x": "y"}

        self.kill_at_each(
            home, with_base, lambda snapshots: snapshots.update("base", {"x": "y"}), after
        )

    def test_remove(self, home: Path) -> None:
        def before(snapshots: Snapshots) -> None:
            with_base(snapshots)
            snapshots.prepare("k", "base")

        def after(step: Step, snapshots: Snapshots) -> None:
            assert not is_there(snapshots, "k") or step is Step.INTENT_WRITTEN

        steps = self.kill_at_each(home, before, lambda snapshots: snapshots.remove("k"), after)
        assert Step.THIN_DELETED in steps


def with_base(snapshots: Snapshots) -> None:
    if not is_there(snapshots, "base"):
        snapshots.prepare("base-key")
        snapshots.commit("base", "base-key")
