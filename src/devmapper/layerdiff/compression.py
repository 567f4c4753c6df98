"""A stream made plain: gzip, bzip2, xz and zstd are known by their first bytes.

Memory is bounded whatever a stranger's stream claims; damage is an `ArchiveError`.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

from devmapper.errors import ArchiveError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_HEAD: Final = 6
_CHUNK: Final = 1 << 18
_MEMORY_LIMIT: Final = 256 << 20  # `xz -9` needs 65 MiB, `zstd --ultra -22` 128 MiB

_GZIP: Final = b"\x1f\x8b\x08"
_BZIP2: Final = b"BZh"
_XZ: Final = b"\xfd7zXZ\0"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"


class _Input(io.RawIOBase):
    """The caller's stream with its first bytes put back; counts what is read."""

    def __init__(self, stream: BinaryIO, progress: Callable[[int], None] | None) -> None:
        super().__init__()
        self._stream = stream
        self._progress = progress
        self.head = b""
        while len(self.head) < _HEAD:
            more = stream.read(_HEAD - len(self.head))
            if not more:
                break
            self.head += more
        self._pending = self.head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        data = self._pending[: len(view)] or self._stream.read(len(view)) or b""
        self._pending = self._pending[len(data) :]
        view[: len(data)] = data
        if data and self._progress is not None:
            self._progress(len(data))
        return len(data)


class _Reader(Protocol):
    """What is used of `io.BufferedReader`, whatever stands behind it."""

    def read(self, size: int, /) -> bytes: ...
    def read1(self, size: int, /) -> bytes: ...
    def readinto(self, buffer: memoryview, /) -> int: ...


class _Decompressor(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Plain(io.RawIOBase):
    """Streams of one kind, one after the other; zero bytes between them are padding (xz)."""

    def __init__(self, source: _Reader, start: Callable[[], _Decompressor]) -> None:
        super().__init__()
        self._source = source
        self._start = start
        self._decompressor = start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        data = b""
        while not data:
            given = b""
            if self._decompressor.eof:
                given = self._next_stream()
                if not given:
                    return 0
            elif self._decompressor.needs_input:
                given = self._source.read1(_CHUNK)
                if not given:
                    raise ArchiveError("", "the compressed stream ends too early")
            data = self._decompressor.decompress(given, len(view))
        view[: len(data)] = data
        return len(data)

    def _next_stream(self) -> bytes:
        rest = self._decompressor.unused_data.lstrip(b"\0")
        while not rest:
            more = self._source.read1(_CHUNK)
            if not more:
                return b""
            rest = more.lstrip(b"\0")
        self._decompressor = self._start()
        return rest


class Decompressed:
    """The plain bytes of a stream, buffered; every damage on the way is an `ArchiveError`."""

    def __init__(self, stream: BinaryIO, progress: Callable[[int], None] | None = None) -> None:
        raw = _Input(stream, progress)
        source = io.BufferedReader(raw, _CHUNK)
        self._reader, self._damage = _open(source, raw.head)

    def read(self, size: int) -> bytes:
        """*size* bytes, fewer at the end only."""
        try:
            return self._reader.read(size)
        except self._damage as err:
            raise _damaged(err) from err

    def readinto(self, view: memoryview) -> int:
        """Fill *view*; less at the end only."""
        try:
            return self._reader.readinto(view)
        except self._damage as err:
            raise _damaged(err) from err

    def drain(self) -> None:
        """Read to the end: sums are checked, and the writer of a pipe meets no closed one."""
        while self.read(_CHUNK):
            pass


def _damaged(err: Exception) -> Exception:
    if isinstance(err, ArchiveError) or (isinstance(err, OSError) and err.errno is not None):
        return err
    return ArchiveError("", f"the compressed stream is damaged: {err}")


def _open(
    source: "io.BufferedReader[_Input]", head: bytes
) -> tuple[_Reader, tuple[type[Exception], ...]]:
    if head.startswith(_GZIP):
        import gzip
        import zlib

        plain = gzip.GzipFile(fileobj=source, mode="rb")
        return io.BufferedReader(plain, _CHUNK), (zlib.error, EOFError, OSError)
    if head.startswith(_BZIP2):
        import bz2

        return io.BufferedReader(_Plain(source, bz2.BZ2Decompressor), _CHUNK), (OSError,)
    if head.startswith(_XZ):
        import lzma

        def start() -> lzma.LZMADecompressor:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_LIMIT)

        return io.BufferedReader(_Plain(source, start), _CHUNK), (lzma.LZMAError,)
    if head.startswith(_ZSTD):
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=_MEMORY_LIMIT)
        frames = decompressor.stream_reader(source, read_across_frames=True)
        return io.BufferedReader(frames, _CHUNK), (zstandard.ZstdError,)
    return source, ()
