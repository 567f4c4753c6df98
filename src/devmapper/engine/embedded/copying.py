"""Copying a sparse file."""

import errno
import os
from pathlib import Path

from devmapper.linux.blockdev import opened
from devmapper.linux.files import sync_directory


def copy_sparse(source: Path, target: Path) -> None:
    """Copy *source* to *target* with its holes, durably; an existing target is overwritten."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with opened(source, os.O_RDONLY) as reader:
        writer = os.open(target, flags, 0o600)
        try:
            size = os.fstat(reader).st_size
            os.ftruncate(writer, size)
            position = 0
            while position < size:
                try:
                    start = os.lseek(reader, position, os.SEEK_DATA)
                except OSError as err:
                    if err.errno == errno.ENXIO:
                        break  # only a hole is left
                    raise
                position = os.lseek(reader, start, os.SEEK_HOLE)
                _copy_range(reader, writer, start, position)
            os.fsync(writer)
        finally:
            os.close(writer)
    sync_directory(target.parent)


def _copy_range(reader: int, writer: int, start: int, end: int) -> None:
    os.lseek(writer, start, os.SEEK_SET)
    while start < end:
        copied = os.sendfile(writer, reader, start, end - start)
        if copied == 0:
            raise OSError(errno.EIO, "file became shorter while it was copied")
        start += copied
