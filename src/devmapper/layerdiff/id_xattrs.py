"""Ids inside of extended attributes: who is named in access lists, and whose capabilities count.

Layouts: linux/posix_acl_xattr.h, linux/capability.h.  What has another layout is left as it is;
the kernel judges it.
"""

from collections.abc import Callable
from struct import Struct
from typing import Final

_ACLS: Final = frozenset({"system.posix_acl_access", "system.posix_acl_default"})
_ACL_VERSION: Final = (2).to_bytes(4, "little")
_ACL_ENTRY: Final = Struct("<HHI")  # tag, permissions, id
_ACL_USER: Final = 0x02
_ACL_GROUP: Final = 0x08

_CAPABILITY: Final = "security.capability"
_REVISION: Final = 3  # the byte of the magic number that holds it
_REVISION_2: Final = 2
_REVISION_3: Final = 3
_ROOT_ID: Final = slice(20, 24)  # user id of the root in whose namespace they count

Lookup = Callable[[int], int | None]


def translated(xattrs: dict[str, bytes], uid: Lookup, gid: Lookup) -> dict[str, bytes]:
    """*xattrs* with each id in them looked up; what is about an id that is None is left out."""
    if not xattrs:
        return xattrs
    found = {}
    for key, value in xattrs.items():
        if key in _ACLS:
            found[key] = _acl(value, uid, gid)
        elif key == _CAPABILITY:
            if (capability := _capability(value, uid)) is not None:
                found[key] = capability
        else:
            found[key] = value
    return found


def _acl(value: bytes, uid: Lookup, gid: Lookup) -> bytes:
    entries = value[4:]
    if value[:4] != _ACL_VERSION or len(entries) % _ACL_ENTRY.size:
        return value
    kept = [_ACL_VERSION]
    for tag, permissions, held in _ACL_ENTRY.iter_unpack(entries):
        name: int | None = held
        if tag == _ACL_USER:
            name = uid(held)
        elif tag == _ACL_GROUP:
            name = gid(held)
        if name is not None:
            kept.append(_ACL_ENTRY.pack(tag, permissions, name))
    return b"".join(kept)


def _capability(value: bytes, uid: Lookup) -> bytes | None:
    """For root himself it is revision 2, which names nobody, as in moby's archives."""
    if len(value) != _ROOT_ID.stop or value[_REVISION] != _REVISION_3:
        return value
    root = uid(int.from_bytes(value[_ROOT_ID], "little"))
    if root is None:
        return None
    if root:
        return value[: _ROOT_ID.start] + root.to_bytes(4, "little")
    return value[:_REVISION] + bytes([_REVISION_2]) + value[_REVISION + 1 : _ROOT_ID.start]
