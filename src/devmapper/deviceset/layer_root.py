"""What stands at the top of a layer's file system: `rootfs`, and `id`; and who owns them."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from devmapper.deviceset.id_maps import ROOT, Owner
from devmapper.errors import MountFailed
from devmapper.linux.blockdev import opened

ROOTFS: Final = "rootfs"
_ID_FILE: Final = "id"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make_owned(path: Path, mode: int, owner: Owner) -> None:
    """Make a directory, or take the one that is there, and give it to *owner* unless that is root.

    moby `idtools` MkdirAndChown; without a user namespace an owner that somebody chose stays.
    """
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    if owner != ROOT:
        with opened(path, _DIRECTORY) as fd:
            owner.give(fd)


def prepare_root(layer: str, path: Path, owner: Owner) -> None:
    """Make `rootfs` and `id` in a layer that is mounted at *path* if they are missing.

    The file system may come from a stranger: whatever stands in their place is not followed.
    `MountFailed` if it cannot be a layer's root, or was mounted read-only before it had one.
    """
    with opened(path, _DIRECTORY) as top:
        _prepare_rootfs(layer, path, top, owner)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(_ID_FILE, flags, 0o600, dir_fd=top)
        except FileExistsError:
            return  # a snapshot still has the id of the ancestor that was mounted first
        except OSError as err:
            if _is_read_only(top):
                return
            raise MountFailed(layer, path, f"{_ID_FILE}: {err.strerror}") from err
        with open(fd, "w", encoding="utf-8") as file:
            file.write(layer)


def _prepare_rootfs(layer: str, path: Path, top: int, owner: Owner) -> None:
    """One that is missing, or was made for root, is *owner*'s afterwards.

    moby gives it to the owner at every mount; here an owner that an image chose stays.
    """
    try:
        found = os.stat(ROOTFS, dir_fd=top, follow_symlinks=False)
    except FileNotFoundError:
        found = _make_rootfs(layer, path, top)
    if not stat.S_ISDIR(found.st_mode):
        raise MountFailed(layer, path, f"its {ROOTFS!r} is not a directory")
    if owner != ROOT and (found.st_uid, found.st_gid) == ROOT and not _is_read_only(top):
        os.chown(ROOTFS, owner.uid, owner.gid, dir_fd=top, follow_symlinks=False)


def _make_rootfs(layer: str, path: Path, top: int) -> os.stat_result:
    if _is_read_only(top):
        raise MountFailed(
            layer,
            path,
            f"it has no {ROOTFS!r} yet and is mounted read-only",
            hint="mount it once without ro in dm.mountopt",
        )
    with suppress(FileExistsError):  # who else got the layer just now
        os.mkdir(ROOTFS, 0o755, dir_fd=top)
    os.chmod(ROOTFS, 0o755, dir_fd=top)  # noqa: S103 - a layer's root is for everybody
    return os.stat(ROOTFS, dir_fd=top, follow_symlinks=False)


def _is_read_only(fd: int) -> bool:
    return bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)
