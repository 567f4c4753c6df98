"""A sparse copy of a metadata device that nobody writes meanwhile."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from devmapper.errors import UsageError
from devmapper.linux import blockdev
from devmapper.units import MIB

_PIECE: Final = MIB
_ZEROS: Final = bytes(_PIECE)


def copy_sparse(source: Path, target: Path) -> None:
    """Make *target* a file with what *source* holds, durably; zeros become holes."""
    with blockdev.opened(source, os.O_RDONLY) as reader:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        writer = os.open(target, flags, 0o600)
        try:
            if os.path.sameopenfile(reader, writer):
                raise UsageError(f"{str(target)!r} is the pool's own metadata device")
            os.ftruncate(writer, 0)
            size = blockdev.size_of(reader, source)
            os.ftruncate(writer, size)
            for offset in _pieces_with_data(reader, size):
                data = os.pread(reader, min(_PIECE, size - offset), offset)
                if data != _ZEROS[: len(data)]:
                    _write(writer, data, offset)
            os.fsync(writer)
        finally:
            os.close(writer)


def _pieces_with_data(fd: int, size: int) -> Iterator[int]:
    offset = 0
    while offset < size:
        try:
            offset = max(offset, os.lseek(fd, offset, os.SEEK_DATA) // _PIECE * _PIECE)
        except OSError as err:
            if err.errno == errno.ENXIO:  # only a hole is left
                return
            if err.errno != errno.EINVAL:  # a block device cannot tell: all of it is data
                raise
        yield offset
        offset += _PIECE


def _write(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
