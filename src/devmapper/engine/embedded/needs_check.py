"""Taking back needs_check: the one way for a pool to be writable again after a failed commit."""

from pathlib import Path

from devmapper.engine.claims import check_unclaimed
from devmapper.engine.device_lock import device_lock
from devmapper.engine.port import Outcome
from devmapper.errors import IntegrityError
from devmapper.thin.blocks import FileDevice
from devmapper.thin.check import check
from devmapper.thin.metadata import PoolMetadata


def clear_needs_check(metadata_device: Path) -> Outcome:
    """Clear the flag of a pool that is not in use, if its metadata have no damage.

    As `thin_check --clear-needs-check-flag`.  ALREADY if the flag is not set.  `PoolBusy` while a
    process or the kernel has the pool open, `IntegrityError` if there is damage; nothing was
    changed then.
    """
    with device_lock(metadata_device):
        check_unclaimed(metadata_device)
        device = FileDevice.open(metadata_device)
        try:
            report = check(device)
            if not report.clean:
                raise IntegrityError(
                    f"metadata {str(metadata_device)!r} have damage, so needs_check stays:"
                    f" {len(report.damages)} findings",
                    hint="devmapper pool check lists them",
                )
            if not report.needs_check:
                return Outcome.ALREADY
            PoolMetadata.open(device).set_needs_check(needs_check=False)
        finally:
            device.close()
    return Outcome.DONE
