"""Values that the engine process and its clients exchange beside those of the port."""

from typing import NamedTuple

from devmapper.engine.port import Activation, NbdExport
from devmapper.units import Bytes, ThinId


class ExportedDevice(NamedTuple):
    """What the engine process knows of an activated device."""

    name: str
    thin_id: ThinId
    size: Bytes
    state: Activation
    open_count: int  # of the file on the export: its loop device, as a rule
    nbd: NbdExport | None = None  # served over NBD, and no file on the export
