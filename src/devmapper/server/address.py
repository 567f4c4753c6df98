"""Where a service listens: the path of a unix socket, or a TCP host and port."""

from pathlib import Path
from typing import Final, NamedTuple

from devmapper.errors import UsageError

_UNIX: Final = "unix:"
_MAX_PORT: Final = 65535


class TcpAddress(NamedTuple):
    host: str
    port: int  # 0: any that is free

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


Address = Path | TcpAddress


def parse_address(text: str) -> Address:
    """Read `127.0.0.1:9273`, `[::1]:9273` or `unix:/run/metrics.sock`; `UsageError`."""
    if text.startswith(_UNIX):
        path = Path(text.removeprefix(_UNIX))
        if not path.is_absolute() or "\0" in text:
            raise UsageError(f"address {text!r} has no absolute path after {_UNIX}")
        return path
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""  # an IPv6 address without brackets: where does its port begin?
    if not colon or not host or not (port.isascii() and port.isdigit()) or len(port) > 5:
        raise UsageError(f"address {text!r} is neither HOST:PORT nor unix:PATH")
    if int(port) > _MAX_PORT:
        raise UsageError(f"address {text!r} has a port above {_MAX_PORT}")
    return TcpAddress(host, int(port))


def show_address(address: Address) -> str:
    """What `parse_address` reads."""
    return f"{_UNIX}{address}" if isinstance(address, Path) else str(address)
