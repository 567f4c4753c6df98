"""The options of a single layer, Docker's `--storage-opt` of create and run."""

from collections.abc import Mapping
from typing import NamedTuple

from devmapper.errors import UsageError
from devmapper.units import Bytes, parse_size


class LayerOptions(NamedTuple):
    size: Bytes | None = None  # None: the parent's


def parse_layer_options(options: Mapping[str, str]) -> LayerOptions:
    """Read them; keys in any case, as moby `deviceset.go` parseStorageOpt.

    `UsageError` for a key other than `size`, and for a value that is no size.
    """
    found = LayerOptions()
    for key, value in options.items():
        if key.lower() != "size":
            raise UsageError(
                f"storage option {key!r} of a layer is unknown", hint="the only one is size"
            )
        try:
            found = LayerOptions(parse_size(value))
        except UsageError as err:
            raise UsageError(
                f"storage option {key}={value} of a layer: expected a size such as 20G"
            ) from err
    return found


def check_size(size: int, parent_size: int, parent: str) -> None:
    """A layer is never smaller than its parent, whose file system it begins with."""
    if size < parent_size:
        raise UsageError(
            f"layer of {size} bytes is smaller than its parent {parent!r},"
            f" which has {parent_size} bytes",
            hint="leave the size out, or name a larger one",
        )
