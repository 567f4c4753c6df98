"""Unpacking the golden images of tests/data; its README.md says what is in them."""

import io
import tarfile
from pathlib import Path
from typing import IO, Final

import zstandard

DATA: Final = Path(__file__).parent.parent / "data"
DOCKER_GRAPHS: Final = ("docker-20.10-ext4", "docker-20.10-xfs")
_PIECE: Final = 64 * 1024
_LONG_WINDOW: Final = 2**27  # the archives were packed with zstd --long=27


def unpack_docker_graph(name: str, target: Path) -> Path:
    """Unpack one of DOCKER_GRAPHS below *target*; returns the folder with `graph` and `expected`.

    The pool's 2 GiB of data stay sparse.  Modes are restored, owners and times are not.
    """
    folder = target / name
    folder.mkdir(parents=True)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LONG_WINDOW)
    with (
        (DATA / f"{name}.tar.zst").open("rb") as packed,
        decompressor.stream_reader(packed) as stream,
        tarfile.open(fileobj=io.BufferedReader(stream), mode="r|") as archive,
    ):
        if hasattr(tarfile, "tar_filter"):  # Debian's Python 3.11.2 has none yet
            archive.extraction_filter = staticmethod(tarfile.tar_filter)
        for member in archive:
            if not member.isreg():
                archive.extract(member, folder)
                continue
            content = archive.extractfile(member)
            assert content is not None
            with content:
                _write_sparse(content, folder / member.name, member)
    return folder


def _write_sparse(content: IO[bytes], path: Path, member: tarfile.TarInfo) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        while piece := content.read(_PIECE):
            if piece.count(0) == len(piece):
                file.seek(len(piece), io.SEEK_CUR)
            else:
                file.write(piece)
        file.truncate(member.size)
    path.chmod(member.mode)


def unpack_image(name: str, target: Path) -> Path:
    """Unpack `tests/data/<name>.bin.zst`, a metadata device; returns the file."""
    path = target / f"{name}.bin"
    packed = (DATA / f"{name}.bin.zst").read_bytes()
    path.write_bytes(zstandard.ZstdDecompressor().decompress(packed))
    return path
