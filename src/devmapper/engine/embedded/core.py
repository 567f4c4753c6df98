"""What the devices of one pool share: metadata, data device, mode, commits."""

import logging
from collections.abc import Sequence

from devmapper.engine.embedded.commit import COMMIT_PERIOD, GroupCommit, PeriodicCommit
from devmapper.engine.embedded.data_file import DataFile
from devmapper.engine.embedded.guarded_metadata import GuardedMetadata
from devmapper.engine.embedded.modes import PoolState
from devmapper.engine.embedded.quarantine import Quarantine
from devmapper.engine.embedded.traffic import Traffic
from devmapper.engine.port import PoolMode, PoolTable
from devmapper.thin.metadata import PoolMetadata
from devmapper.thin.space_map import Run

log = logging.getLogger(__name__)


class PoolCore:
    """The moving parts of a pool, and the few things that take more than one of them."""

    def __init__(
        self,
        table: PoolTable,
        metadata: PoolMetadata,
        data: DataFile,
        state: PoolState,
        *,
        commit_period: float = COMMIT_PERIOD,
    ) -> None:
        self.data = data
        self.state = state
        self.traffics: frozenset[Traffic] = frozenset()  # of the open devices
        self.commits = GroupCommit(self._write_back)
        self.periodic = PeriodicCommit(self.commits, period=commit_period)
        self.metadata = GuardedMetadata(metadata, state, self._note_change)
        self.quarantine = Quarantine(
            data,
            table.block_size,
            wait_for_earlier_io=self._wait_for_earlier_io,
            release=self._release,
        )
        self.load(table)

    def load(self, table: PoolTable) -> None:
        """Take over the features of *table*."""
        self.table = table
        self.block_size = table.block_size
        self.clears_new_blocks = not table.skip_block_zeroing
        self.state.error_if_no_space = table.error_if_no_space
        self.quarantine.passdown = not (table.no_discard_passdown or table.ignore_discard)
        self.state.wake()

    def start(self) -> None:
        self._watch_low_water()
        self.periodic.start()
        self.quarantine.start()

    def allocate(self, wanted: int) -> list[int]:
        """Up to *wanted* data blocks; none means `wait_for_space`."""
        blocks = self.metadata.allocate(wanted)
        self._watch_low_water()
        return blocks

    def wait_for_space(self, traffic: Traffic) -> None:
        """Return when allocating is worth another try; ENOSPC when the wait was too long.

        The caller holds nothing and is not inside *traffic*: what it waits for may wait for that.
        """
        if self._reclaim():
            return
        self.state.run_out_of_data_space()
        self._look_for_space()  # it may have come before the mode said that somebody waits
        self.periodic.hurry()
        self.state.wait_for_space(lambda: traffic.closed or not self.state.writable)

    def find_space(self) -> None:
        """To be called when data blocks may have become free."""
        self._look_for_space()
        self._watch_low_water()

    def stop(self) -> None:
        """End the threads after a last commit; what the commit raised goes on to the caller."""
        self.periodic.stop()
        try:
            if self.state.writable:
                self.commits.run()
        finally:
            self.quarantine.stop()

    def _reclaim(self) -> bool:
        """Get back what is freed but not committed, or not released; whether there is any."""
        self.commits.run()
        self.quarantine.drain()
        return self._free_blocks() > 0

    def _free_blocks(self) -> int:
        with self.metadata.reading() as metadata:
            return metadata.nr_allocatable_data_blocks

    def _look_for_space(self) -> None:
        if self.state.mode is PoolMode.OUT_OF_DATA_SPACE and self._free_blocks():
            self.state.find_space()

    def _watch_low_water(self) -> None:
        free, mark = self.metadata.nr_free_data_blocks, self.table.low_water_mark
        total = self.table.data_size // self.block_size
        reached = free < mark < total
        if reached and not self.state.low_water_reached:
            log.warning(
                "pool %s: %d data blocks are free, less than the low-water mark of %d",
                self.state.name,
                free,
                mark,
            )
        self.state.low_water_reached = reached

    def _note_change(self) -> None:
        self.periodic.note_change()
        if self.state.mode is PoolMode.OUT_OF_DATA_SPACE:
            self.periodic.hurry()

    def _write_back(self) -> None:
        """One round of the group commit: data, data again if need be, metadata.

        A data device that fails to sync may have dropped what it was given, so the mappings to it
        are dropped too, and a later flush does not pretend that all is well.
        """
        seen = self.metadata.published
        try:
            self.data.sync()
        except OSError as err:
            self.metadata.degrade(err)
            raise
        runs = self.metadata.commit(self.data.sync, seen)
        if runs:
            self.quarantine.add(runs)
        self.state.check_flushable()

    def _wait_for_earlier_io(self) -> None:
        for traffic in self.traffics:
            traffic.wait_for_earlier()

    def _release(self, runs: Sequence[Run]) -> None:
        self.metadata.release(runs)
        self.find_space()
