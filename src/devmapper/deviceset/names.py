"""What things are called: the graph's prefix, its pool, its devices, and which layer ids are fit.

No I/O but one stat of the graph's home.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Final, NamedTuple, NewType, Self

from devmapper.errors import UsageError
from devmapper.linux.dmnode import MAX_NAME, is_plain

LayerId = NewType("LayerId", str)

BASE: Final = LayerId("")  # the base layer; "base" is only how files and devices spell it
BASE_NAME: Final = "base"
DEVICESET_METADATA: Final = "deviceset-metadata"
TRANSACTION_METADATA: Final = "transaction-metadata"
MIGRATED_SUFFIX: Final = ".migrated"
RESERVED: Final = frozenset({BASE_NAME, DEVICESET_METADATA, TRANSACTION_METADATA})

_MAX_ID_BYTES: Final = 255  # NAME_MAX: an id is a file's name
_DIGEST_DIGITS: Final = 32
_UNFIT: Final = re.compile(r"[^A-Za-z0-9#+\-.:=@_]", re.ASCII)


class GraphNames(NamedTuple):
    """Names of one graph, all of which start with `docker-<major>:<minor>-<inode>`."""

    prefix: str
    given_pool: str | None = None  # a pool that the graph did not make (dm.thinpooldev)

    @classmethod
    def of(cls, home: Path, given_pool: str | None = None) -> Self:
        """Derive them from the home's device and inode, as moby `deviceset.go` initDevmapper does.

        A graph that was copied or restored has another inode, so its names change; nothing on disk
        depends on them.
        """
        found = home.stat()
        major, minor = old_device_numbers(found.st_dev)
        return cls(f"docker-{major}:{minor}-{found.st_ino}", given_pool)

    @property
    def pool(self) -> str:
        return self.given_pool or f"{self.prefix}-pool"

    def device(self, layer: LayerId) -> str:
        """Name of a layer's device.

        The kernel takes 127 bytes, and udev some characters only.  Docker's own ids always fit; in
        another one what does not fit is replaced, and a digest keeps it unique.
        """
        name = f"{self.prefix}-{file_name(layer)}"
        if is_plain(name):
            return name
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:_DIGEST_DIGITS]
        head = _UNFIT.sub("_", name)[: MAX_NAME - _DIGEST_DIGITS - 1]
        return f"{head}={digest}"


def file_name(layer: LayerId) -> str:
    """How files and devices spell a layer's id."""
    return layer or BASE_NAME


def layer_of_file(name: str) -> LayerId:
    return BASE if name == BASE_NAME else LayerId(name)


def layer_id(text: str) -> LayerId:
    """Check an id that a user gave, else `UsageError`; the base layer has no such id.

    An id becomes a file beside Docker's own files and a directory, so what would leave the
    directory, hide there or be skipped by a scan is refused.
    """
    reason = _unfit(text)
    if reason:
        raise UsageError(
            f"layer id {text!r} {reason}", hint="use letters, digits, '-', '_' and '.'"
        )
    return LayerId(text)


def internal_layer_id(text: str) -> LayerId:
    """As `layer_id`, and the empty string stands for the base layer, as in moby."""
    return BASE if text == "" else layer_id(text)


def old_device_numbers(device: int) -> tuple[int, int]:
    """Major and minor as moby decodes a `dev_t`: only 12 bits of the major number count."""
    return (device >> 8) & 0xFFF, (device & 0xFF) | ((device >> 12) & 0xFFF00)


def _unfit(text: str) -> str:
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not text:
        return "is empty"
    if length > _MAX_ID_BYTES:
        return f"has {length} bytes, expected at most {_MAX_ID_BYTES}"
    if "/" in text:
        return "contains '/'"
    if text.startswith("."):
        return "starts with a dot"
    if not text.isprintable():
        return "contains a character that cannot be printed"
    if text in RESERVED or text.endswith(MIGRATED_SUFFIX):
        return "is reserved"
    return ""
